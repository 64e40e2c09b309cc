"""Prints the estimated and the measured peak memory of a pass: python -m tests.peak_memory ARGUMENTS."""

import contextlib
import sys

import cache
from utils.script import parse


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def main() -> None:
    load, seen = cache.load_base_model, {}

    def loading(*arguments):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        seen["before"] = status("VmRSS")
        return load(*arguments)

    def estimated(need, *rest):
        seen["estimate"] = need.memory

    cache.load_base_model, cache.check_fits = loading, estimated
    with contextlib.redirect_stdout(sys.stderr):
        cache.main(parse(cache.Config))
    print(seen["estimate"], status("VmHWM") - seen["before"])


if __name__ == "__main__":
    main()
