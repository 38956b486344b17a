#!/usr/bin/env bash
# The worker side of a job: installs sedd; runs, shows and ends one command, which outlives the connection.
#
#     bash tpu_launch/worker.sh setup EXTRAS [PYTHON]    # with PYTHON, which has all requirements, nothing is installed
#     bash tpu_launch/worker.sh run COMMAND...           # does nothing if it runs; refused while another runs
#     bash tpu_launch/worker.sh same COMMAND...          # refused if the last command is another one
#     bash tpu_launch/worker.sh state                    # one line
#     bash tpu_launch/worker.sh log LINES WORKER [-F]    # lines begin with the worker's name if WORKER is "all"
#     bash tpu_launch/worker.sh stop SECONDS             # SIGTERM, on which training saves; SIGKILL after SECONDS
#     bash tpu_launch/worker.sh end SECONDS              # the same before a restart
#
# launch.py calls it on every worker; it can be called directly on a machine with GPUs. It works in the parent folder of
# its own. Files of .job/ there: path (folder of the programs), command, pid (also the process group), log, exit (exit
# status), asked (SIGTERM was sent), halted (stopped permanently). A job runs while one of its processes holds the lock.
# Exit status 3: refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p .job
LOCK=.job/lock
worker=${HOSTNAME##*-w-}  # TPU machines are called NAME-w-0, NAME-w-1, ...

say() { echo "worker $worker: $*"; }
idle() { flock --shared --nonblock "$LOCK" true; }
refuse() { say "$* is running; end it with stop first" >&2; exit 3; }

setup() {
  idle || refuse "$(cat .job/command)"
  local python=${2:-$PWD/.venv/bin/python}
  if [ -z "${2:-}" ]; then
    PATH=$HOME/.local/bin:$PATH
    command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [ -x "$python" ] || uv venv --python 3.11 .venv
    uv pip install --quiet --python "$python" --constraint tpu_launch/constraints.txt --editable ".[$1]"
  fi
  local versions
  versions=$("$python" -c 'import sys, jax, sedd.version as sedd
print(f"sedd {sedd.__version__}, JAX {jax.__version__}, Python {sys.version.split()[0]}")')
  dirname "$python" > .job/path
  say "$versions"
}

same() { [ "$(cat .job/command)" = "$*" ] || refuse "$(cat .job/command)"; }

run() {
  exec 9> "$LOCK"  # the job inherits it
  if ! flock --wait 1 9; then  # `state` holds the lock for less than that
    same "$@"
    say "is already running"
    return
  fi
  rm -f .job/exit .job/asked .job/halted
  [ ! -f .job/log ] || mv .job/log .job/log.old
  echo "$*" > .job/command
  setsid bash tpu_launch/worker.sh job "$@" > .job/log 2>&1 < /dev/null &
  echo $! > .job/pid
  say "started"
}

job() {
  local status=0
  trap : TERM  # the command handles it
  export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
  [ ! -f .job/path ] || PATH=$(cat .job/path):$PATH
  python3 tpu_launch/attempt.py "$@" || status=$?
  echo "$status" > .job/exit.part
  mv .job/exit.part .job/exit
}

state() {
  local word=none
  if ! idle; then
    word=running
  elif [ "$(cat .job/exit 2> /dev/null)" = 0 ]; then
    word=done
  elif [ -f .job/halted ]; then
    word=halted
  elif [ -f .job/exit ]; then
    word="failed $(cat .job/exit)"
    [ "$word" != "failed 75" ] || word=stopped  # from attempt.py
  elif [ -f .job/command ]; then
    word=lost
  fi
  local last
  last=$(tail -c 4000 .job/log 2> /dev/null | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c 1-160) || true
  say "$word | $last"
}

log() {
  local mark=""
  [ "$2" != all ] || mark="worker $worker | "
  tail -n "$1" "${@:3}" .job/log | sed -u "s/^/$mark/"
}

end() {
  if idle; then
    say "nothing runs"
    return
  fi
  local group
  group=$(cat .job/pid)
  # One signal: a second would end sedd before it has saved.
  [ -f .job/asked ] || { touch .job/asked; kill -TERM -- "-$group" || true; }
  if flock --shared --wait "$1" "$LOCK" true; then
    say "ended"
  else
    kill -KILL -- "-$group" || true
    say "killed after $1 s"
  fi
}

stop() {
  [ ! -f .job/command ] || touch .job/halted
  end "$1"
}

# One line, which bash reads before it runs anything: the file may be replaced meanwhile.
case ${1:-} in setup | run | same | job | state | log | end | stop) "$@"; exit ;; *) sed -n 4,10p "$0"; exit 2 ;; esac
