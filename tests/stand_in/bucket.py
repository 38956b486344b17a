"""A fake of Google Cloud Storage: the part of its JSON API that gcsfs and tensorstore use, in memory, on loopback.

Every write creates a new generation of an object. Conditions on generations, ranges and pages are supported.
"""

import itertools
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

OBJECT = r"/storage/v1/b/([^/]+)/o/([^/]+)"


class Object(NamedTuple):
    data: bytes
    generation: int


class Bucket(ThreadingHTTPServer):
    """A context manager that runs the server. objects: by bucket and name; only its buckets exist.

    page: maximum number of names in a listing. refuse: given method and path, returns an error status or None.
    on_write: called with bucket and name before an object is written.
    """

    daemon_threads, page = True, 1000

    def __init__(self, *buckets):
        super().__init__(("localhost", 0), Request)
        self.objects: dict[str, dict[str, Object]] = {bucket: {} for bucket in buckets}
        self.lock, self.generations, self.uploads = threading.RLock(), itertools.count(1_700_000_000_000_001), {}
        self.refuse, self.on_write = lambda method, path: None, lambda bucket, name: None
        self.counts = defaultdict(int)  # number of requests, by method
        self.url = f"http://localhost:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Ignores a client that disconnects in the middle, as gcsfs does with concurrent requests."""

    def names(self, folder):
        """Returns the names of the objects below gs://BUCKET/FOLDER, relative to it."""
        bucket, _, prefix = folder.removeprefix("gs://").partition("/")
        return sorted(name[len(prefix) + 1 :] for name in self.objects[bucket] if name.startswith(f"{prefix}/"))


class Request(BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

    def log_message(self, *_):
        pass

    def answer(self):
        split = urlsplit(self.path)
        self.query = dict(parse_qsl(split.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.counts[self.command] += 1
        refused = self.server.refuse(self.command, unquote(self.path))
        if refused:
            return self.fail(refused, "Anonymous caller does not have access" if refused == 401 else "refused")
        for pattern, methods in ROUTES:
            match = re.fullmatch(pattern, split.path)
            if match and self.command in methods:
                return methods[self.command](self, *map(unquote, match.groups()))
        return self.fail(501, "not supported by the fake")

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def send(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers["Content_Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        for name, value in {**headers, "Content_Length": len(content)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status, message):
        self.send(status, {"error": {"code": status, "message": message}})

    def about(self, bucket, name, item):
        time = "2024-01-01T00:00:00.000Z"
        known = dict(kind="storage#object", bucket=bucket, name=name, size=str(len(item.data)), metageneration="1")
        return known | dict(generation=str(item.generation), timeCreated=time, updated=time)

    def holds(self, bucket, name):
        """True if the bucket exists and the conditions hold; else sends the error."""
        if bucket not in self.server.objects:
            return self.fail(404, "The specified bucket does not exist.")
        item = self.server.objects[bucket].get(name)
        now = item.generation if item else 0
        if int(self.query.get("ifGenerationMatch", now)) != now:
            return self.fail(412, "At least one of the pre-conditions you specified did not hold.")
        if int(self.query.get("ifGenerationNotMatch", -1)) == now:
            return self.send(304) if self.command == "GET" else self.fail(412, "conditionNotMet")
        return True

    def put(self, bucket, name, data):
        self.server.on_write(bucket, name)
        with self.server.lock:
            if self.holds(bucket, name):
                item = self.server.objects[bucket][name] = Object(data, next(self.server.generations))
                self.send(200, self.about(bucket, name, item))

    def get(self, bucket, name):
        if not self.holds(bucket, name):
            return
        item = self.server.objects[bucket].get(name)
        if item is None:
            self.fail(404, f"No such object: {bucket}/{name}")
        elif self.query.get("alt") != "media":
            self.send(200, self.about(bucket, name, item))
        else:
            self.media(item)

    def media(self, item):
        headers, size = dict(x_goog_generation=item.generation, Content_Type="application/octet-stream"), len(item.data)
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not requested:
            return self.send(200, item.data, **headers)
        first, last = requested.groups()
        begin = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if begin >= size:
            return self.fail(416, "The requested range is not satisfiable")
        self.send(206, item.data[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{size}", **headers)

    def delete(self, bucket, name):
        with self.server.lock:
            if self.holds(bucket, name):
                item = self.server.objects[bucket].pop(name, None)
                self.send(204) if item else self.fail(404, f"No such object: {bucket}/{name}")

    def list(self, bucket):
        if not self.holds(bucket, ""):
            return
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        begin, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        entries = {}  # name: True for a prefix, which is one entry of a page
        for name in sorted(self.server.objects[bucket]):
            if name.startswith(prefix) and name >= begin and not (end and name >= end):
                head, more, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries[prefix + head + more if more else name] = bool(more)
        left = [name for name in entries if name > self.query.get("pageToken", "")]
        listed = left[: min(self.server.page, int(self.query.get("maxResults", 1000)))]
        items = [self.about(bucket, name, self.server.objects[bucket][name]) for name in listed if not entries[name]]
        page = {"kind": "storage#objects", "items": items, "prefixes": [name for name in listed if entries[name]]}
        self.send(200, page | ({"nextPageToken": listed[-1]} if len(listed) < len(left) else {}))

    def upload(self, bucket):
        kind = self.query["uploadType"]
        if kind == "media":
            self.put(bucket, self.query["name"], self.body)
        elif kind == "multipart":
            edge = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            parts = [part.lstrip(b"\r\n") for part in self.body.split(b"--" + edge)[1:-1]]
            about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            self.put(bucket, json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", data))
        elif self.holds(bucket, self.query["name"]):
            key = str(len(self.server.uploads))
            self.server.uploads[key] = bucket, self.query["name"], bytearray()
            self.send(200, Location=f"{self.server.url}/upload/{key}")

    def upload_part(self, key):
        bucket, name, data = self.server.uploads[key]
        data += self.body
        if self.headers["Content-Range"].endswith("/*"):
            self.send(308, Range=f"bytes=0-{len(data) - 1}")
        else:
            self.put(bucket, name, bytes(data))

    def copy(self, bucket, name, other, to, move=False):
        self.server.on_write(other, to)
        with self.server.lock:
            item = self.server.objects.get(bucket, {}).get(name)
            if item is None:
                self.fail(404, f"No such object: {bucket}/{name}")
            elif self.holds(other, to):
                copied = self.server.objects[other][to] = Object(item.data, next(self.server.generations))
                about = self.about(other, to, copied)
                if move:
                    del self.server.objects[bucket][name]
                self.send(200, {"done": True, "resource": about} if "/rewriteTo/" in self.path else about)

    def move(self, bucket, name, to):
        self.copy(bucket, name, bucket, to, move=True)

    def bucket(self, bucket):
        if self.holds(bucket, ""):
            self.send(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})

    def make(self):
        self.server.objects.setdefault(json.loads(self.body)["name"], {})
        self.send(200, {"kind": "storage#bucket"})


ROUTES = [
    ("/storage/v1/b", {"POST": Request.make}),
    ("/storage/v1/b/([^/]+)", {"GET": Request.bucket}),
    ("/storage/v1/b/([^/]+)/o", {"GET": Request.list}),
    (f"(?:/download)?{OBJECT}", {"GET": Request.get, "DELETE": Request.delete}),
    (OBJECT + "/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", {"POST": Request.copy}),
    (OBJECT + "/moveTo/o/([^/]+)", {"POST": Request.move}),
    ("/upload/storage/v1/b/([^/]+)/o", {"POST": Request.upload}),
    ("/upload/([0-9]+)", dict.fromkeys(("POST", "PUT"), Request.upload_part)),
]
