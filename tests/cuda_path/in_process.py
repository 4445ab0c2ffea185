"""SGLang's real `Scheduler` in this process, driven without tokenizer and detokenizer processes."""

import gc
import os
from array import array
from contextlib import suppress
from typing import Any

import observers
import plants
import sglang.srt.managers.scheduler as scheduler_module
import stand_ins.table
import torch
from device import DEVICE
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from dflare.engine import sampling

DEFAULTS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "log_level": "info",
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    # Batches of one to four run as graphs, larger ones eagerly.
    "cuda_graph_bs_decode": [1, 2, 4],
    "disable_prefill_cuda_graph": True,
}
# Polls without work after which everything in flight has been processed.
_IDLE_POLLS = 4


class _Stop(Exception):
    """Ends the event loop."""


class InProcessScheduler:
    """A scheduler of the CUDA path, with overlap scheduling and graphs unless told otherwise.

    Args:
        target: Folder of the target.
        draft: Folder of a drafter, for DFLARE.
        widths: Verify widths of successive decode steps, cyclic; or a value of DFLARE_ADAPTIVE.
        from_text: Whether trees are drafted from the request's own text (see `observers`).
        plant: Name of a bug to put in (see `plants`).
        order: Seed of a random legal order of the device's work, None to run work at once.
        memory_gb: Size of the device, for a model whose memory is counted and never touched: no
            work on more than a megabyte runs.
        rank, ranks, port: Of tensor parallelism.
        server_args: SGLang's, over `DEFAULTS`.
    """

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        widths: list[int] | str = "off",
        from_text: bool = False,
        plant: str | None = None,
        order: int | None = None,
        memory_gb: float | None = None,
        rank: int = 0,
        ranks: int = 1,
        port: int | None = None,
        **server_args: Any,
    ) -> None:
        os.environ["DFLARE_ADAPTIVE"] = widths if isinstance(widths, str) else "on"
        if memory_gb:
            DEVICE.set_memory_size(int(memory_gb * 1e9))
            DEVICE.set_work_limit(1 << 20)
        load_plugins()
        self._proposals = observers.Proposals()
        self._script = None if isinstance(widths, str) else observers.Script(widths)
        if from_text:
            observers.draft_from_text()
        if plant:
            plants.plant(plant)
        if draft:
            server_args = {
                "speculative_algorithm": "DFLARE",
                "speculative_draft_model_path": draft,
            } | server_args
        arguments = DEFAULTS | server_args
        if ranks > 1:
            arguments |= {"tp_size": ranks, "nccl_port": port, "disable_custom_all_reduce": True}
        args = ServerArgs(model_path=target, **arguments)
        args.resolve_once()
        args.check_server_args()
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
        self._answers: dict[str, dict[str, Any]] = {}
        self._open: dict[str, Any] = {}
        self._inbox: list[tuple[int, Any]] = []
        self._aborts: dict[str, int] = {}
        self._reqs: dict[str, Any] = {}
        self._rank = rank
        self._take_over_io()
        self._scheduler = scheduler_module.Scheduler(args, PortArgs.init_new(args))
        torch.cuda.synchronize()
        self.set_order(order)

    def set_order(self, seed: int | None) -> None:
        """Let the device run work in a random legal order from now on, or at once (None)."""
        DEVICE.set_lazy(seed is not None, seed or 0)

    def take(self, turns: list[Any]) -> None:
        """Let decode steps be these in turn from now on, of what was built for `widths`."""
        self._script.take(turns)

    def sample_in_parts(self, part_bytes: int) -> int:
        """Let sampling hold so many bytes of logits at once; returns how many it held before."""
        before, sampling._PART_BYTES = sampling._PART_BYTES, part_bytes
        return before

    def generate(
        self,
        requests: list[dict[str, Any]],
        count_waits: bool = False,
        watch_races: bool = False,
    ) -> dict[str, Any]:
        """Run requests to their end.

        Args:
            requests: Each with `rid`, `ids` and `sampling`, and perhaps `after` (polls of the
                scheduler before it arrives), `abort_after` (tokens), `logprobs` (top n).

        Returns:
            `answers` by rid: `ids`, `finish`, `cached`, `retracted`, `logprobs`, `proposals`;
            `widths` of the decode steps and the `batches` that they ran for; `replays` of graphs;
            `waits` of the host by call site; `races`, accesses that are in order by luck alone.
        """
        for request in requests:
            self._inbox.append((request.get("after", 0), self._to_request(request)))
            self._open[request["rid"]] = request
            if "abort_after" in request:
                self._aborts[request["rid"]] = request["abort_after"]
        self._polls = self._idle = 0
        ran = self._script.ran if self._script else []
        ran.clear()
        replays = DEVICE.stats()["graph_launches"]
        if watch_races:
            DEVICE.watch_races(True)
        with observers.host_waits(count_waits) as waits, suppress(_Stop):
            self._scheduler.run_event_loop()
        torch.cuda.synchronize()
        answers = {request["rid"]: self._answers.pop(request["rid"]) for request in requests}
        for rid, proposals in self._proposals.collect().items():
            if rid in answers:
                answers[rid]["proposals"] = proposals
        races = []
        if watch_races:
            DEVICE.watch_races(False)
            races = list(DEVICE.races())
        return {
            "answers": answers,
            "widths": [width for width, _ in ran],
            "batches": [requests for _, requests in ran],
            "replays": DEVICE.stats()["graph_launches"] - replays,
            "waits": dict(waits),
            "races": races,
        }

    def flush_cache(self) -> None:
        """Forget all prompts and answers."""
        assert self._scheduler.flush_cache(), "the scheduler was not idle"

    def report(self) -> dict[str, Any]:
        """What the device did so far: tasks, captures, graph launches, stand-ins' launches."""
        stats = DEVICE.stats()
        del stats["live_bytes"]
        return stats | {"launches_of_stand_ins": sum(stand_ins.table.launches.values())}

    def graphs(self) -> dict[str, int]:
        """Number of CUDA graphs, bytes of states [., T * H] that they leave, free bytes."""
        graphs = [b._outputs for b in gc.get_objects() if isinstance(b, FullCudaGraphBackend)]
        outputs = [out for of_runner in graphs for out in of_runner.values()]
        states = [x for out in outputs if (x := getattr(out, "hidden_states", None)) is not None]
        hidden = self._scheduler.model_config.hidden_size
        kept = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in states
            if x.shape[-1] > hidden
        }
        free = torch.cuda.mem_get_info()[0]
        return {"graphs": len(outputs), "tap_bytes": sum(kept.values()), "free_bytes": free}

    def count_step_launches(self) -> None:
        """Keep what the host launches in decode steps from now on, for `step_launches`."""
        self._step_launches = observers.StepLaunches(self._scheduler.draft_worker)

    def step_launches(self) -> list[dict[str, int]]:
        """Of every decode step since `count_step_launches`; see `observers.StepLaunches`."""
        return self._step_launches.steps

    def widths(self) -> list[int]:
        """Verify widths that steps may have."""
        return list(self._scheduler.draft_worker.arms._states.widths)

    def launches(self) -> dict[str, int]:
        """Launches so far by the kernel's name; in a graph, at its capture."""
        return dict(stand_ins.table.launches)

    def attributes(self, paths: list[str]) -> list[Any]:
        """Values of the scheduler's attributes by dotted path, to see what SGLang chose."""
        values = []
        for path in paths:
            value: Any = self._scheduler
            for name in path.split("."):
                value = getattr(value, name)
            values.append(value if isinstance(value, (int, str, float, bool)) else repr(value))
        return values

    def _take_over_io(self) -> None:
        """Requests come from the inbox; finished ones are kept instead of sent."""
        receive = SchedulerRequestReceiver.recv_requests
        stream = SchedulerOutputStreamer.stream_output

        def recv_requests(receiver, local_reqs=None):
            received = receive(receiver, local_reqs)
            if _Stop in received:
                raise _Stop
            return received

        def stream_output(streamer, reqs, *args, **kwargs):
            for req in reqs:
                self._note(req)
            stream(streamer, reqs, *args, **kwargs)

        SchedulerRequestReceiver.recv_requests = recv_requests
        SchedulerRequestReceiver._pull_raw_reqs = lambda _: self._pull()
        SchedulerOutputStreamer.stream_output = stream_output

    def _pull(self) -> list[Any] | None:
        if self._rank:
            return None
        self._polls += 1
        due = [request for after, request in self._inbox if after < self._polls]
        self._inbox = [entry for entry in self._inbox if entry[0] >= self._polls]
        for rid in [rid for rid, at in self._aborts.items() if self._length(rid) >= at]:
            del self._aborts[rid]
            due.append(AbortReq(rid=rid))
        if due or self._open or self._inbox:
            self._idle = 0
        else:
            self._idle += 1
        return [_Stop] if self._idle > _IDLE_POLLS else due

    def _to_request(self, request: dict[str, Any]) -> TokenizedGenerateReqInput:
        params = SamplingParams(**request["sampling"])
        params.normalize(self._scheduler.tokenizer)
        logprobs = request.get("logprobs")
        return TokenizedGenerateReqInput(
            rid=request["rid"],
            input_text=None,
            input_ids=array("q", request["ids"]),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=logprobs is not None,
            logprob_start_len=-1,
            top_logprobs_num=logprobs or 0,
            token_ids_logprob=None,
            stream=True,
        )

    def _length(self, rid: str) -> int:
        return len(self._reqs[rid].output_ids) if rid in self._reqs else 0

    def _note(self, req: Any) -> None:
        self._reqs[req.rid] = req
        if req.finished() and self._open.pop(req.rid, None) is not None:
            self._reqs.pop(req.rid)
            self._answers[req.rid] = _to_answer(req)


def _to_answer(req: Any) -> dict[str, Any]:
    answer = {
        "ids": list(req.output_ids)[: req.finished_len],
        "finish": req.finished_reason.to_json(),
        "cached": req.cached_tokens,
        "retracted": req.retraction_count,
        "proposals": [],
    }
    if req.return_logprob:
        answer["logprobs"] = list(req.logprob.output_token_logprobs_val)
        answer["logprob_ids"] = list(req.logprob.output_token_logprobs_idx)
        answer["top_logprobs"] = [list(row) for row in req.logprob.output_top_logprobs_val]
    return answer
