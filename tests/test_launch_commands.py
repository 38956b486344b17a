"""What the launcher says to other programs and to people: dry runs, linted by Google's own command line where that is
installed; mistakes; and the files for other ways to launch."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from launching import MACHINES, PLACE, launch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_experiments import parsed

from sedd.config_file import load_config

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tpu_launch"
COMMAND = ["--", "sedd", "eval", "--model=gs://bucket/runs/a"]
UP = ["up", *PLACE, *MACHINES, "--spot", "--push=data/mine", "--push=gs://bucket/more/data/b", *COMMAND]
OTHERS = [
    ["stop", *PLACE, "--grace=9", "--ssh_arg=--internal-ip"],
    ["logs", *PLACE, "--worker=1", "-f"],
    ["status", *PLACE, "--project=p"],
    ["delete", *PLACE, "--project=p"],
    ["create", *PLACE, "--project=p", "--type=v4-8", "--create_arg=--reserved", "--create_arg=--internal-ips"],
]
DRY = """\
gcloud compute tpus queued-resources list --zone=zone-a '--format=value(name.basename(),state.state)'
gcloud compute tpus tpu-vm list --zone=zone-a '--format=value(name.basename(),state)'
gcloud compute tpus queued-resources create tpu --node-id=tpu --zone=zone-a --accelerator-type=v5litepod-16 \
--runtime-version=v2-alpha-tpuv5-lite --spot --async --quiet
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=all --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=mkdir -p sedd/.job sedd/data sedd/more/data/b'
tar --exclude=__pycache__ -hczf TMP/sedd-tpu.tar.gz -C ROOT sedd experiments tpu_launch setup.cfg pyproject.toml \
README.md LICENSE
gcloud compute tpus tpu-vm scp TMP/sedd-tpu.tar.gz tpu:sedd/ --zone=zone-a --worker=all --quiet \
--scp-flag=-oServerAliveInterval=30 --recurse
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=all --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=flock --shared --nonblock --conflict-exit-code=3 sedd/.job/lock tar --recursive-unlink \
-xzf sedd/sedd-tpu.tar.gz -C sedd'
gcloud compute tpus tpu-vm scp data/mine tpu:sedd/data/ --zone=zone-a --worker=all --quiet \
--scp-flag=-oServerAliveInterval=30 --recurse
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=all --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=gcloud storage rsync gs://bucket/more/data/b sedd/more/data/b --recursive'
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=all --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=bash sedd/tpu_launch/worker.sh setup tpu,gcs'
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=all --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=bash sedd/tpu_launch/worker.sh run env JAX_PLATFORMS=tpu,cpu sedd eval --model=gs://bucket/runs/a'
gcloud compute tpus queued-resources list --zone=zone-a '--format=value(name.basename(),state.state)'
gcloud compute tpus tpu-vm list --zone=zone-a '--format=value(name.basename(),state)'
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=all --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=bash sedd/tpu_launch/worker.sh state'
gcloud compute tpus tpu-vm ssh tpu --zone=zone-a --worker=0 --quiet --ssh-flag=-oServerAliveInterval=30 \
'--command=bash sedd/tpu_launch/worker.sh log 30 0'
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with something to push."""
    (tmp_path / "data/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def dry(argv, capfd):
    """The commands that a dry run prints, a line each."""
    cut = argv.index("--") if "--" in argv else len(argv)
    assert launch.main([*argv[:cut], "--dry_run", *argv[cut:]]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return [line for line in out.splitlines() if not line.startswith("tpu: ")]


def test_a_dry_run_says_it_all(capfd, monkeypatch):
    """In lines to be pasted; and runs nothing."""
    monkeypatch.setattr(subprocess, "run", None)
    shown = "\n".join(dry(UP, capfd)) + "\n"
    assert shown.replace(str(ROOT), "ROOT").replace(tempfile.gettempdir(), "TMP") == DRY


def test_steps_are_those_of_up(capfd):
    """Nothing is said in two ways."""
    whole = dry(UP, capfd)
    machines, pushed = MACHINES + ["--spot"], [word for word in UP if word.startswith("--push")]
    for step, flags in (("create", machines), ("push", pushed), ("setup", []), ("run", COMMAND), ("status", [])):
        lines = dry([step, *PLACE, *flags], capfd)
        assert lines and set(lines) <= set(whole)


def test_other_flags_arrive(capfd):
    said = [dry(argv, capfd)[-1] for argv in OTHERS]
    assert "--internal-ip" in said[0] and "worker.sh stop 9" in said[0]
    assert "--worker=1" in said[1] and "worker.sh log 20 1 -F" in said[1]
    assert said[3].endswith("delete tpu --zone=zone-a --project=p --force --quiet")
    assert "--runtime-version=tpu-ubuntu2204-base --reserved --internal-ips --async" in said[4]
    assert all("--project=p" in line for line in dry(OTHERS[2], capfd))


REAL = shutil.which("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="the Google Cloud SDK is not installed")
def test_the_real_command_line_takes_it(tmp_path, monkeypatch, capfd):
    """Without an account or a network. The control: a flag that there is not."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    lines = [line for argv in [UP, *OTHERS] for line in dry(argv, capfd)]
    inner = [word.partition("--command=")[2] for line in lines for word in shlex.split(line)]
    said = sorted({line for line in lines + inner if line.startswith("gcloud ")})
    assert len(said) > 10 and any(line.startswith("gcloud storage") for line in said)
    wrong = [line + " --no-such-flag" for line in said]
    (tmp_path / "said.json").write_text(json.dumps([{"command_string": line} for line in said + wrong]))
    argv = [REAL, "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/said.json"]
    found = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert [line["success"] for line in found] == [True] * len(said) + [False] * len(wrong), found


MISTAKES = [
    (["up", *PLACE, *MACHINES], "up needs a command at its end: -- sedd train"),
    (["status", *PLACE, "--", "sedd"], "status takes no command"),
    (["run", *PLACE, "--type=v4-8", "--", "sedd"], "unrecognized arguments: --type=v4-8"),
    (["create", *PLACE], "required: --type"),
    (["push", *PLACE, "--push=/data"], "/data is no path below this folder, nor gs://BUCKET/PATH"),
    (["push", *PLACE, "--push=../data"], "../data is no path below"),
    (["push", *PLACE, "--push=gs://bucket"], "gs://bucket is no path below"),
    (["push", *PLACE, "--push=data/other"], "data/other: there is none here; gs://BUCKET/data/other takes it from"),
    (["run", *PLACE, "--env=A", "--", "sedd"], "A is not KEY=VALUE"),
    (["launch", *PLACE], "invalid choice: 'launch'"),
    (["run", *PLACE, "sedd", "train"], "unrecognized arguments: sedd train; a command for the machines comes after --"),
    (["create", *PLACE, "--type=v4-8", "--create_arg", "--reserved"], "is written --create_arg=-..."),
    (["up", *PLACE, "--type=v4-8", "--poll=-1", "--", "sedd"], "-1 is no number of seconds"),
    (["up", *PLACE, "--type=v4-8", "--backoff=nan", "--", "sedd"], "nan is no number of seconds"),
    (["status", *PLACE, "--retries=-1"], "-1 is no whole number"),
    (["logs", *PLACE, "--lines=1e3"], "1e3 is no whole number"),
    (["stop", *PLACE, "--grace=soon"], "soon is no whole number"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes(argv, message, capfd):
    """One line that says what to change, before anything is done."""
    try:
        status = launch.main(argv)
    except SystemExit as stopped:
        status = stopped.code
    (line,) = capfd.readouterr().err.splitlines()
    assert status == 2 and message in line


def test_what_to_type_next_can_be_typed(capfd):
    """Whatever the names."""
    options = launch.parse(["delete", "--name=my tpu", "--zone=a", "--project=p'q"])
    options.then_delete = False
    job = launch.Job(launch.Gcloud(options), launch.Calls(0, 0.0, True), options)
    job.there = True
    launch._settle(job, ended=False)
    *_, step, name, zone, project = shlex.split(capfd.readouterr().err)
    again = launch.parse([step, name, zone, project])
    assert (again.name, again.zone, again.project) == ("my tpu", "a", "p'q")


def test_a_missing_program(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    assert launch.main(["status", *PLACE]) == 1
    assert capfd.readouterr().err == "launch: error: there is no gcloud on the PATH; install it\n"


def test_the_flow_knows_no_place():
    """What is Google's is in one file, and one dictionary names it."""
    for file in FOLDER.glob("*.py"):
        assert file.stem in ("gcloud", "launch", "backend") or "gcloud" not in file.read_text(), file
    assert set(launch.BACKENDS) == {"gcloud"}


def test_states():
    """What the two lists say together. Machines of other names do not matter."""
    backend = launch.Gcloud(launch.parse(["status", *PLACE]))

    def state(resource, node="READY"):
        answers = [f"other\tACTIVE\ntpu\t{resource}\n", f"tpu\t{node}\nother\tREADY\n"]
        return backend.seen(answers).state.name

    assert state("ACTIVE") == "READY"
    waits = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "DELETING", "SUSPENDING", "", "NEW_WORD"]
    assert {state(word) for word in waits} == {"WAITING"}
    assert {state("ACTIVE", word) for word in ("CREATING", "REPAIRING", "STOPPED", "")} == {"WAITING"}
    assert {state("ACTIVE", word) for word in ("PREEMPTED", "TERMINATED")} == {"LOST"}
    assert (state("SUSPENDED"), state("FAILED")) == ("LOST", "FAILED")
    assert backend.seen(["other\tACTIVE\n", "tpu\tREADY\n"]).state.name == "GONE"
    assert backend.seen(["tpu\tACTIVE\n", "other\tREADY\n"]).state.name == "LOST"


@pytest.mark.parametrize(
    "kind, runtime",
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v3-8", "tpu-ubuntu2204-base"),
    ],
)
def test_runtimes(kind, runtime):
    options = launch.parse(["create", *PLACE, f"--type={kind}"])
    assert f"--runtime-version={runtime}" in launch.Gcloud(options).create()
    options = launch.parse(["create", *PLACE, f"--type={kind}", "--runtime=mine"])
    assert "--runtime-version=mine" in launch.Gcloud(options).create()


SAID = "import sys; print(1); print('all is saved, and the same command continues', file=sys.stderr); sys.exit({})"


@pytest.mark.parametrize(
    "code, status",
    [(SAID.format(0), 75), (SAID.format(1), 1), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_an_attempt(code, status):
    """What the command prints passes through."""
    argv = [sys.executable, FOLDER / "attempt.py", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == status
    if code.startswith("import sys"):
        assert (done.stdout, done.stderr) == ("1\n", "all is saved, and the same command continues\n")


@pytest.mark.parametrize("command", [[], ["no-such-program", "train"]])
def test_an_attempt_at_nothing_is_one_line(command):
    argv = [sys.executable, FOLDER / "attempt.py", *command]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 127 and done.stderr.count("\n") == 1 and "there is no such command" in done.stderr


def test_an_attempt_that_is_told_to_end():
    """The command is told so too, and not twice: a second time would end it before it has saved."""
    code = "import signal; signal.signal(15, lambda *_: print('told')); print('up', flush=True); input()"
    argv = [sys.executable, FOLDER / "attempt.py", sys.executable, "-c", code]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.terminate()
    time.sleep(0.5)
    assert process.communicate("\n", timeout=60)[0] == "" and process.returncode == 0


def test_an_attempt_as_the_first_process():
    """Of a container, where it alone is told to end; else it would end the command twice."""
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, FOLDER / "attempt.py", sys.executable, "-c", code]
    space = ["unshare", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no process namespaces")
    process = subprocess.Popen([*space, *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    subprocess.run(["kill", "-TERM", child], check=True)
    assert process.wait(60) == 7


def test_constraints_are_what_setup_asks_for():
    """A version for each requirement, also of accelerators, that it allows."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line for line in (FOLDER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    wanted = config["options"]["install_requires"].split()
    wanted += [config["options.extras_require"][extra] for extra in ("tpu", "cuda12", "cuda13", "tokenizers")]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert {"libtpu", "gcsfs", "jax-cuda12-plugin", "jax-cuda13-plugin"} <= set(pinned)


def trained(text):
    """The one command of sedd's in a text, which parses."""
    (found,) = re.findall(r"sedd train (?:[^\n]*\\\n)*[^\n]*", text)
    return parsed(found.replace("\\\n", " "))


def test_kubernetes():
    """A machine of the slice for each process, and its chips; what is local lies where the config looks for it."""
    (jobset,) = yaml.safe_load_all((FOLDER / "gke.yaml").read_text())
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"]
    assert across * down == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    args = parsed(shlex.join(container["args"]))
    corpus = load_config(ROOT / args.config).data.corpus
    assert pod["initContainers"][0]["command"][-2] == f"/{corpus}"
    assert container["volumeMounts"][0]["mountPath"] == f"/sedd/{Path(corpus).parent}"
    assert (ROOT / container["command"][1]).is_file()


def test_the_other_ways():
    """Their commands parse, and the files that they name are there."""
    sky = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert trained(sky["run"]).config == "experiments/text8_absorb.py"
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    for name in ("sky.yaml", "slurm.sbatch", "worker.sh", "Dockerfile", "gke.yaml", "README.md"):
        named = re.findall(r"(?:tpu_launch|experiments)/[\w.]+\w", (FOLDER / name).read_text())
        assert named and all((ROOT / file).is_file() for file in named), name
    for script in ("worker.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", FOLDER / script], check=True)


def test_the_page():
    """Every command of the launcher's in README.md is one; so is the one that launch.py shows."""
    text = (FOLDER / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.S)).replace("\\\n", " ")
    found = [line for line in blocks.splitlines() if line.startswith("python tpu_launch/launch.py")]
    assert {launch.parse(shlex.split(line, comments=True)[2:]).step for line in found} == {
        "up",
        "status",
        "logs",
        "stop",
        "delete",
    }
    shown = launch.__doc__.replace("\\\n", " ")
    (line,) = re.findall(r"python tpu_launch/launch.py (.*)", shown)
    assert parsed(shlex.join(launch.parse(shlex.split(line)).command)).command == "train"


def test_files_stay_readable():
    for file in FOLDER.iterdir():
        if file.is_file():
            lines = file.read_text().splitlines()
            assert len(lines) <= 300 and max(map(len, lines)) <= 120, file
