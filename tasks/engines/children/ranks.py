"""A training shared by processes of one machine: FSDP2 splits weights and optimizer state among the ranks."""

from __future__ import annotations

import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing import get_context, spawn

from tasks.engines.children.blocks import decoder_blocks
from tasks.engines.children.border import Report, Run, as_told, device_of


def run_ranks(run: Run, processes: int, request: dict[str, Any], out: Path, report: Report) -> None:
    """Call `run(request, out, report)` in so many processes, of which the first one reports; on GPUs, each has its own.

    Raises the PipelineError of a rank, RuntimeError of another error, or torch's ProcessException when one was killed;
    the others end with it.
    """
    progress, tell = get_context("spawn").Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="sdd-ranks-") as folder:
        ranks = spawn(_rank, (processes, f"file://{folder}/meeting", tell, run, request, out), processes, join=False)
        try:
            while True:
                if progress in wait([progress, *ranks.sentinels]):  # what a rank told before its end comes first
                    message = progress.recv()
                    if isinstance(message, Exception):
                        raise message
                    report(*message)
                elif ranks.join(0):
                    return
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()


def _rank(
    number: int, processes: int, meeting: str, tell: Connection, run: Run, request: dict[str, Any], out: Path
) -> None:
    cuda = device_of(request["runtime"]) == "cuda"
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    try:
        if cuda:
            torch.cuda.set_device(number)
        dist.init_process_group("nccl" if cuda else "gloo", init_method=meeting, rank=number, world_size=processes)
        run(request, out, lambda done, text: tell.send((done, text)) if number == 0 else None)
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        # Told rather than raised: a rank that ends by itself may wait for the others, who wait for it.
        tell.send(as_told(error) or RuntimeError(f"rank {number}: {type(error).__name__}: {error}"[:1000]))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """1 in a process of no group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sharded(model: Any, device: str) -> Any:
    """The model, every rank keeping its part of each weight; those of a block are whole while the block runs.

    model: on CPU, the same on every rank; one block after the other goes to the device. Gradients are summed over the
    ranks.
    """
    mesh = init_device_mesh(device, (count(),))
    for module in (*decoder_blocks(model, model.config.get_text_config().num_hidden_layers), model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def summed(value: float, device: str) -> float:
    """Over the ranks, the same on each of them."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the parts of all ranks, on the CPU of rank 0; nothing elsewhere. Every rank has to call it."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        full = tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            found[name] = full.cpu().contiguous()
    return found


def part_of(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a tensor that goes with `weight`, on the weight's device."""
    tensor = tensor.to(weight.device)
    if not isinstance(weight, DTensor) or tensor.shape != weight.shape:
        return tensor
    # A copy, as the part is a view that would keep the whole.
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None).clone()
