"""The launcher's commands and messages: dry runs, linted by Google's own command line if it is installed; invalid
arguments; and the files for other schedulers."""

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
    """A working directory with data to push."""
    (tmp_path / "data/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def dry(argv, capfd):
    """Returns the commands that a dry run prints, one a line."""
    cut = argv.index("--") if "--" in argv else len(argv)
    assert launch.main([*argv[:cut], "--dry_run", *argv[cut:]]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return [line for line in out.splitlines() if not line.startswith("tpu: ")]


def test_a_dry_run_prints_all_commands_and_runs_none(capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    shown = "\n".join(dry(UP, capfd)) + "\n"
    assert shown.replace(str(ROOT), "ROOT").replace(tempfile.gettempdir(), "TMP") == DRY


def test_each_step_runs_a_part_of_the_commands_of_up(capfd):
    all_commands = dry(UP, capfd)
    machines, pushed = MACHINES + ["--spot"], [word for word in UP if word.startswith("--push")]
    for step, flags in (("create", machines), ("push", pushed), ("setup", []), ("run", COMMAND), ("status", [])):
        lines = dry([step, *PLACE, *flags], capfd)
        assert lines and set(lines) <= set(all_commands)


def test_flags_are_passed_on(capfd):
    last = [dry(argv, capfd)[-1] for argv in OTHERS]
    assert "--internal-ip" in last[0] and "worker.sh stop 9" in last[0]
    assert "--worker=1" in last[1] and "worker.sh log 20 1 -F" in last[1]
    assert last[3].endswith("delete tpu --zone=zone-a --project=p --force --quiet")
    assert "--runtime-version=tpu-ubuntu2204-base --reserved --internal-ips --async" in last[4]
    assert all("--project=p" in line for line in dry(OTHERS[2], capfd))


REAL = shutil.which("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="the Google Cloud SDK is not installed")
def test_commands_pass_the_linter_of_gcloud(tmp_path, monkeypatch, capfd):
    """Without an account or a network. Control: an unknown flag."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    lines = [line for argv in [UP, *OTHERS] for line in dry(argv, capfd)]
    inner = [word.partition("--command=")[2] for line in lines for word in shlex.split(line)]
    right = sorted({line for line in lines + inner if line.startswith("gcloud ")})
    assert len(right) > 10 and any(line.startswith("gcloud storage") for line in right)
    wrong = [line + " --no-such-flag" for line in right]
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": line} for line in right + wrong]))
    argv = [REAL, "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/commands.json"]
    results = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert [line["success"] for line in results] == [True] * len(right) + [False] * len(wrong), results


INVALID = [
    (["up", *PLACE, *MACHINES], "up needs a command at its end: -- sedd train"),
    (["status", *PLACE, "--", "sedd"], "status takes no command"),
    (["run", *PLACE, "--type=v4-8", "--", "sedd"], "unrecognized arguments: --type=v4-8"),
    (["create", *PLACE], "required: --type"),
    (["push", *PLACE, "--push=/data"], "/data is neither a path below this folder nor gs://BUCKET/PATH"),
    (["push", *PLACE, "--push=../data"], "../data is neither a path below"),
    (["push", *PLACE, "--push=gs://bucket"], "gs://bucket is neither a path below"),
    (["push", *PLACE, "--push=data/other"], "data/other does not exist; gs://BUCKET/data/other copies it from"),
    (["run", *PLACE, "--env=A", "--", "sedd"], "A is not KEY=VALUE"),
    (["launch", *PLACE], "invalid choice: 'launch'"),
    (["run", *PLACE, "sedd", "train"], "unrecognized arguments: sedd train; a command for the machines comes after --"),
    (["create", *PLACE, "--type=v4-8", "--create_arg", "--reserved"], "is written --create_arg=-..."),
    (["up", *PLACE, "--type=v4-8", "--poll=-1", "--", "sedd"], "-1 is not a number of seconds"),
    (["up", *PLACE, "--type=v4-8", "--backoff=nan", "--", "sedd"], "nan is not a number of seconds"),
    (["status", *PLACE, "--retries=-1"], "-1 is not a whole number"),
    (["logs", *PLACE, "--lines=1e3"], "1e3 is not a whole number"),
    (["stop", *PLACE, "--grace=soon"], "soon is not a whole number"),
]


@pytest.mark.parametrize("argv, message", INVALID, ids=[message for _, message in INVALID])
def test_an_invalid_argument_is_one_line(argv, message, capfd):
    """The line says what to change; nothing is run."""
    try:
        status = launch.main(argv)
    except SystemExit as stopped:
        status = stopped.code
    (line,) = capfd.readouterr().err.splitlines()
    assert status == 2 and message in line


def test_the_printed_delete_command_parses(capfd):
    """Also with names that need quoting."""
    options = launch.parse(["delete", "--name=my tpu", "--zone=a", "--project=p'q"])
    options.then_delete = False
    job = launch.Job(launch.Gcloud(options), launch.Calls(0, 0.0, True), options)
    job.exists = True
    launch._clean_up(job, ended=False)
    *_, step, name, zone, project = shlex.split(capfd.readouterr().err)
    again = launch.parse([step, name, zone, project])
    assert (again.name, again.zone, again.project) == ("my tpu", "a", "p'q")


def test_a_missing_gcloud_is_one_line(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    assert launch.main(["status", *PLACE]) == 1
    assert capfd.readouterr().err == "launch: error: there is no gcloud on the PATH; install it\n"


def test_only_one_module_depends_on_gcloud():
    """And one dictionary names it."""
    for file in FOLDER.glob("*.py"):
        assert file.stem in ("gcloud", "launch", "backend") or "gcloud" not in file.read_text(), file
    assert set(launch.BACKENDS) == {"gcloud"}


def test_status_of_the_machines():
    """It is parsed from two lists, which may contain machines of other names."""
    backend = launch.Gcloud(launch.parse(["status", *PLACE]))

    def state(resource, node="READY"):
        answers = [f"other\tACTIVE\ntpu\t{resource}\n", f"tpu\t{node}\nother\tREADY\n"]
        return backend.parse_status(answers).state.name

    assert state("ACTIVE") == "READY"
    waits = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "DELETING", "SUSPENDING", "", "NEW_WORD"]
    assert {state(word) for word in waits} == {"WAITING"}
    assert {state("ACTIVE", word) for word in ("CREATING", "REPAIRING", "STOPPED", "")} == {"WAITING"}
    assert {state("ACTIVE", word) for word in ("PREEMPTED", "TERMINATED")} == {"LOST"}
    assert (state("SUSPENDED"), state("FAILED")) == ("LOST", "FAILED")
    assert backend.parse_status(["other\tACTIVE\n", "tpu\tREADY\n"]).state.name == "GONE"
    assert backend.parse_status(["tpu\tACTIVE\n", "other\tREADY\n"]).state.name == "LOST"


@pytest.mark.parametrize(
    "kind, runtime",
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v3-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_image_depends_on_the_type(kind, runtime):
    options = launch.parse(["create", *PLACE, f"--type={kind}"])
    assert f"--runtime-version={runtime}" in launch.Gcloud(options).create()
    options = launch.parse(["create", *PLACE, f"--type={kind}", "--runtime=mine"])
    assert "--runtime-version=mine" in launch.Gcloud(options).create()


PRINTS = "import sys; print(1); print('all is saved, and the same command continues', file=sys.stderr); sys.exit({})"


@pytest.mark.parametrize(
    "code, status",
    [(PRINTS.format(0), 75), (PRINTS.format(1), 1), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_exit_status_of_an_attempt(code, status):
    """The output of the command is passed through."""
    argv = [sys.executable, FOLDER / "attempt.py", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == status
    if code.startswith("import sys"):
        assert (done.stdout, done.stderr) == ("1\n", "all is saved, and the same command continues\n")


@pytest.mark.parametrize("command", [[], ["no-such-program", "train"]])
def test_an_attempt_at_a_missing_command_is_one_line(command):
    argv = [sys.executable, FOLDER / "attempt.py", *command]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 127 and done.stderr.count("\n") == 1 and "there is no such command" in done.stderr


def test_an_attempt_does_not_forward_sigterm():
    """A machine signals all processes; a second SIGTERM would end the command before it has saved."""
    code = "import signal; signal.signal(15, lambda *_: print('SIGTERM')); print('up', flush=True); input()"
    argv = [sys.executable, FOLDER / "attempt.py", sys.executable, "-c", code]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.terminate()
    time.sleep(0.5)
    assert process.communicate("\n", timeout=60)[0] == "" and process.returncode == 0


def test_an_attempt_forwards_sigterm_as_process_1():
    """A container signals only that process."""
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, FOLDER / "attempt.py", sys.executable, "-c", code]
    space = ["unshare", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow process namespaces")
    process = subprocess.Popen([*space, *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    subprocess.run(["kill", "-TERM", child], check=True)
    assert process.wait(60) == 7


def test_constraints_satisfy_the_requirements():
    """Each requirement, also of accelerators, has a version that it allows."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line for line in (FOLDER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    requirements = config["options"]["install_requires"].split()
    requirements += [config["options.extras_require"][extra] for extra in ("tpu", "cuda12", "cuda13", "tokenizers")]
    for requirement in map(Requirement, requirements):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert {"libtpu", "gcsfs", "jax-cuda12-plugin", "jax-cuda13-plugin"} <= set(pinned)


def train_command(text):
    """Returns the parsed arguments of the one `sedd train` command in a text."""
    (command,) = re.findall(r"sedd train (?:[^\n]*\\\n)*[^\n]*", text)
    return parsed(command.replace("\\\n", " "))


def test_the_kubernetes_manifest_is_consistent():
    """One process for each machine of the slice, with its chips; the corpus is where the config looks for it."""
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


def test_files_of_other_schedulers_are_valid():
    """Their commands parse, and the files that they name exist."""
    sky = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert train_command(sky["run"]).config == "experiments/text8_absorb.py"
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    for name in ("sky.yaml", "slurm.sbatch", "worker.sh", "Dockerfile", "gke.yaml", "README.md"):
        files = re.findall(r"(?:tpu_launch|experiments)/[\w.]+\w", (FOLDER / name).read_text())
        assert files and all((ROOT / file).is_file() for file in files), name
    for script in ("worker.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", FOLDER / script], check=True)


def test_commands_of_the_readme_parse():
    """And the command in the help of launch.py."""
    text = (FOLDER / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.S)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("python tpu_launch/launch.py")]
    assert {launch.parse(shlex.split(line, comments=True)[2:]).step for line in commands} == {
        "up",
        "status",
        "logs",
        "stop",
        "delete",
    }
    text = launch.__doc__.replace("\\\n", " ")
    (line,) = re.findall(r"python tpu_launch/launch.py (.*)", text)
    assert parsed(shlex.join(launch.parse(shlex.split(line)).command)).command == "train"


def test_files_have_at_most_300_lines_of_120_columns():
    for file in FOLDER.iterdir():
        if file.is_file():
            lines = file.read_text().splitlines()
            assert len(lines) <= 300 and max(map(len, lines)) <= 120, file
