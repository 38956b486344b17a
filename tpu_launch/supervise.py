"""Launches a job, watches it, and launches it again after a preemption or a failure of its command."""

from backend import State
from calls import USAGE_ERROR, Failed, say
from job import Job, Worker

_TAIL = 30  # lines of a log
_MAX_LOGS = 3  # number of failed workers whose logs are printed
_HEALTHY = {"running", "done"}


class Ended(Failed):
    """The command ended without success."""


def up(job: Job, start: bool = True):
    """Runs the command until it is done on all workers. start: begin with launching, else with watching.

    Ended or Failed after more than --retries consecutive failures, or if a retry cannot help.
    """
    failures, launched, again = 0, not start, not start
    job.exists = job.prepared = not start
    while True:
        try:
            if not launched:
                launch(job, again)
                launched = True
            watch(job)
            return
        except Failed as failed:
            if failed.final:
                raise
            problem = failed
        say(str(problem))
        job.calls.sleep(job.options.poll)  # machines are signalled some time before their state changes
        preempted = launched and _is_preempted(job)
        launched, again = False, True
        failures = 0 if preempted else failures + 1
        if failures > job.options.retries:
            raise problem
        if failures:
            job.calls.pause(failures)


def _is_preempted(job: Job) -> bool:
    """True if the machines are known not to be ready."""
    try:
        return job.machines().state is not State.READY
    except Failed:
        return False


def launch(job: Job, again: bool = False):
    """Does all steps up to a running command that are not done yet. again: the job was launched before."""
    if job.create():
        job.prepared, workers = False, []
    else:
        workers = job.workers()
    states = {worker.state for worker in workers}
    if again and "halted" in states:
        raise Failed("the command was stopped by `stop`; up starts it again", final=True)
    if "running" in states and states <= _HEALTHY:
        job.check_same()
        job.prepared = True
        return
    if "running" in states:  # these wait for a worker that failed
        job.end()
    if not job.prepared:
        job.push()
        job.setup()
        job.prepared = True
    job.run()


def watch(job: Job):
    """Waits until the command is done on all workers. Ended if it ends otherwise; Failed if the machines are lost."""
    before = None
    while True:
        status = job.machines()
        if job.calls.dry_run:
            job.workers()
            break
        if status.state is not State.READY:
            raise Failed(f"{job.name} is {status.word}")
        workers = job.workers()
        states = {worker.state for worker in workers}
        if states == {"done"}:
            say("done")
            break
        if not workers or not states <= _HEALTHY:
            raise _ended(job, workers)
        now = f"{sum(worker.state == 'running' for worker in workers)} of {len(workers)} run | {workers[0].last}"
        if now != before:
            say(now)
            before = now
        job.calls.sleep(job.options.poll)
    job.log("0", _TAIL)


def _ended(job: Job, workers: list[Worker]) -> Failed:
    """Prints the logs of failed workers; returns the error."""
    failed = [worker for worker in workers if worker.state == "failed"]
    for worker in failed[:_MAX_LOGS]:
        job.log(worker.name, _TAIL)
    if any(worker.state == "halted" for worker in workers):
        return Failed("the command was stopped by `stop`; up starts it again", final=True)
    final = any(worker.status == USAGE_ERROR for worker in failed)
    return Ended(", ".join(map(str, workers)) or "nothing runs", final=final)
