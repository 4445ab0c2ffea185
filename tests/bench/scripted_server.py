"""SGLang's server, whose decode steps take turns of all widths whatever the policy says.

    python scripted_server.py ...   # the arguments of sglang.launch_server

Its scheduler is a spawned process, which imports this file again.
"""

import dataclasses
import itertools
import runpy

from dflare.adaptive import ArmPolicy, chain

_TURNS = itertools.cycle((3, 1, 8, 2, 1, 1, 5, 8, 8, 4))
_choose = ArmPolicy.choose


def _choose_in_turn(self, request_ids, remaining):
    decision = _choose(self, request_ids, remaining)
    widths = self.config.widths
    return dataclasses.replace(decision, arm=chain(min(next(_TURNS), widths[-1])))


ArmPolicy.choose = _choose_in_turn

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
