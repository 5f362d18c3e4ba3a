"""Parameters, gradients and optimizer state shared out over processes (PyTorch's fully_shard), for models that do not fit on one.

Every decoder layer, every encoder layer and the policy (in fp32) is gathered when its turn comes and dropped after it. What is left
(embeddings, norms, head, projector) is the root's and stays gathered from the beginning of a part's forward to the end of its
backward. The root's forward is Refrag.forward, which runs the stage's whole loss: its networks call each other's methods and
weights directly, and FSDP only knows calls of modules.

All processes must gather the same layers in the same order. So a batch without a single chunk encodes one all the same, with
gradients of zero (Refrag.no_slots), and parameters without a gradient are reduced as zeros.

A checkpoint is a folder STAGE/checkpoint-STEP: every process writes its own shards, the last step's folder gets its name by one
rename, and the one before it is removed then. At a stage's end the whole weights go, tensor by tensor, to process 0 and into
STAGE/weights, which is what the next stage's `init` names.
"""
import contextlib
import functools
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from weights_tools.shards import Entry, write_sharded

from .common import BACKENDS, Optimizer, computes_in_bf16
from .model import Chunk

SHARD_BYTES = 5_000_000_000


def checkpointed(layer):
    """The layer keeps only its inputs for the backward pass and computes the rest again. Its gathering hooks stay outside."""
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


class ShardedModel:
    """What common.train() needs of a model that is sharded. run: precision (in bf16 parameters are gathered and computed so, gradients
    reduced in fp32), activation_checkpointing, reduce_each_part (gradients are reduced after every part instead of the
    step's last: less memory, more traffic)."""

    def __init__(self, model, opt, world, run):
        if opt.get("muon"):
            raise ValueError('[optimizer] muon: expected false with sharding = "fsdp" (it needs whole matrices), found true')
        if not dist.is_initialized():
            dist.init_process_group(BACKENDS[world.device.type], store=dist.HashStore(), rank=0, world_size=1)
        self.model, self.world, self.reduce_each_part = model, world, run.get("reduce_each_part", False)
        layers = [*model.decoder.model.layers, *model.encoder.encoder.layer]
        if run.get("activation_checkpointing"):
            for layer in layers:
                checkpointed(layer)
        mesh = init_device_mesh(world.device.type, (world.size,))
        full = MixedPrecisionPolicy()
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if computes_in_bf16(world.device, run) else full
        for module, policy in (*((layer, precision) for layer in layers), (model.policy, full), (model, precision)):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Parts are weighted by 1 / parts already: gradients are added up, not averaged. gloo can do no more than add.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        model.set_reduce_scatter_unused_params(True)
        model.no_slots = self.no_slots
        if (weights := getattr(model, "pending", None)) is not None:
            from .pretrained import fill

            fill(model, weights)
            del model.pending
        self.optimizer = Optimizer(model, opt, world)

    def no_slots(self):
        """[0, d_dec], made of one chunk that the encoder has read."""
        chunk = Chunk()
        chunk.encoder = [3]
        return self.model.projector(self.model.encode([chunk]))[:0]

    @contextlib.contextmanager
    def part(self, is_last):
        self.model.set_requires_gradient_sync(is_last or self.reduce_each_part)
        self.model.set_is_last_backward(is_last)
        yield

    def run(self, loss_of, *arguments):
        return self.model(loss_of, *arguments)

    def reduce_gradients(self):
        """Nothing is left to do: the last part's backward has reduced them."""

    def state(self):
        model, optimizer = get_state_dict(self.model, [part for part, _ in self.optimizer.parts])
        return {"model": model, "optimizer": optimizer}

    @staticmethod
    def checkpoints(folder):
        """[(step, folder)], the latest last."""
        found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
        return sorted(found)

    def save(self, extra, path):
        """path: STAGE/last.pt, which is not written: its folder is what counts."""
        folder = path.parent
        final = folder / f"checkpoint-{extra['step']}"
        temporary = folder / f"{final.name}.tmp"
        if self.world.sum(torch.tensor(float(self.world.rank == 0 and final.exists()))):
            return  # a step's checkpoint is always the same
        if self.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        with warnings.catch_warnings(action="ignore"):
            dcp.save(self.state(), checkpoint_id=str(temporary))
        if self.world.rank == 0:
            torch.save(extra, temporary / "extra.pt")
            for file in temporary.iterdir():
                handle = os.open(file, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            os.replace(temporary, final)
            for step, old in self.checkpoints(folder):
                if step < extra["step"]:
                    shutil.rmtree(old)
        dist.barrier()

    def load(self, path):
        found = self.checkpoints(path.parent) if path.parent.is_dir() else []
        if not found:
            return None
        folder = found[-1][1]
        state = self.state()
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state, checkpoint_id=str(folder))
        set_state_dict(self.model, [part for part, _ in self.optimizer.parts], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return torch.load(folder / "extra.pt", weights_only=True, map_location="cpu")

    def finish(self, out):
        """Writes OUT/weights: the whole model in fp32, its networks' names in front. One tensor at a time is whole."""
        entries = [Entry(name, torch.float32, tuple(p.shape), lambda p=p: p.detach().full_tensor()) for name, p in self.model.named_parameters()]
        temporary, final = Path(out) / "weights.tmp", Path(out) / "weights"
        if self.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        write_sharded(temporary if self.world.rank == 0 else None, entries, SHARD_BYTES)
        if self.world.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        dist.barrier()
