"""A job kept alive: launched, watched, and launched again when its machines are taken away or its command fails."""

from backend import State
from calls import MISTAKE, Failed, say
from job import Job, Worker

_TAIL = 30  # lines of a log
_MANY = 3  # workers whose logs are shown
_FINE = {"running", "done"}


class Ended(Failed):
    """The command was seen to end, and not well."""


def up(job: Job, start: bool = True):
    """Until the command is done on all workers. start: with launching; else with watching what runs.

    Ended or Failed, if it failed more often than --retries says, or there is no hope.
    """
    failures, launched, again = 0, not start, not start
    job.there = job.prepared = not start
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
        job.calls.sleep(job.options.poll)  # machines are told to go some time before one sees it
        taken = launched and _taken_away(job)
        launched, again = False, True
        failures = 0 if taken else failures + 1
        if failures > job.options.retries:
            raise problem
        if failures:
            job.calls.pause(failures)


def _taken_away(job: Job) -> bool:
    """As far as one can see."""
    try:
        return job.seen().state is not State.READY
    except Failed:
        return False


def launch(job: Job, again: bool = False):
    """Everything up to a running command, and of that only what is not done. again: it was launched before."""
    if job.create():
        job.prepared, workers = False, []
    else:
        workers = job.workers()
    states = {worker.state for worker in workers}
    if again and "halted" in states:
        raise Failed("somebody stopped the command; up starts it again", final=True)
    if "running" in states and states <= _FINE:
        job.check_same()
        job.prepared = True
        return
    if "running" in states:  # they wait for one that failed
        job.end()
    if not job.prepared:
        job.push()
        job.setup()
        job.prepared = True
    job.run()


def watch(job: Job):
    """Looks on until the command is done on all workers. Ended, if it ends otherwise; Failed, if machines go away."""
    before = None
    while True:
        seen = job.seen()
        if job.calls.dry_run:
            job.workers()
            break
        if seen.state is not State.READY:
            raise Failed(f"{job.name} is {seen.word}")
        workers = job.workers()
        states = {worker.state for worker in workers}
        if states == {"done"}:
            say("done")
            break
        if not workers or not states <= _FINE:
            raise _ended(job, workers)
        now = f"{sum(worker.state == 'running' for worker in workers)} of {len(workers)} run | {workers[0].last}"
        if now != before:
            say(now)
            before = now
        job.calls.sleep(job.options.poll)
    job.log("0", _TAIL)


def _ended(job: Job, workers: list[Worker]) -> Failed:
    """What there is to say, after the logs of those that failed."""
    failed = [worker for worker in workers if worker.state == "failed"]
    for worker in failed[:_MANY]:
        job.log(worker.name, _TAIL)
    if any(worker.state == "halted" for worker in workers):
        return Failed("somebody stopped the command; up starts it again", final=True)
    hopeless = any(worker.status == MISTAKE for worker in failed)
    return Ended(", ".join(map(str, workers)) or "nothing runs", final=hopeless)
