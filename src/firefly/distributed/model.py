"""A model as its backend trains it: wrapped, with optimizer, schedule and collectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.optimization import GreedyLR
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import align_special_tokens, load_sharded_checkpoint
from transformers.training_args import OptimizerNames

from firefly.data.batching import StepTotals
from firefly.distributed.backends import BACKENDS, Backend, gathered
from firefly.errors import UsageError
from firefly.files import one_line
from firefly.models.adapters import count_body, transformers_model
from firefly.models.checkpointing import decoder_layers
from firefly.models.precision import Precision
from firefly.models.router import router_settings
from firefly.models.scores import scores
from firefly.models.tuning import Choices
from firefly.models.unread import UNREAD, Unread, unread_of


class TrainableModel:
    """A model, what trains it, and how its steps are computed.

    Attributes:
        module: the PEFT or transformers model; under FSDP2 the sharded one.
        wrapped: what a forward pass calls: `module`, or what DDP or DeepSpeed made of it.
        optimizer, scheduler: there after `prepare`.
        parameters: those that are trained.
        choices: the tuning; lowered after a step that ran out of memory.
        full: whether every weight is trained (in fp32, computed under autocast); otherwise an adapter is.
        router: of a mixture of experts, what its load-balancing loss depends on.
        identity: what its checkpoints are bound to, for plan.json.
        bare: torch's own calls suffice, without accelerate around them.
    """

    def __init__(
        self,
        module: Any,
        args: TrainingArguments,
        backend: Backend = BACKENDS["single"],
        *,
        layout: str,
        choices: Choices,
        precision: Precision,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = self.wrapped = module
        self.args = args
        self.backend = backend
        self.layout = layout
        self.choices = choices
        self.full = full = not hasattr(module, "peft_config")
        self.identity = identity or {}
        self.device = args.device
        self.ranks = args.world_size
        self.solo = layout == "solo"
        # Frozen weights are held in the compute type; full fine-tuning keeps fp32 weights and computes under autocast.
        self.autocast_type = precision.compute if full and precision.compute != torch.float32 else None
        inner = transformers_model(module)
        self.router = None if scores(inner) else router_settings(inner)  # no classifier has a router loss
        # Products of the body per parameter and token: forward 2, gradient of the input 2, gradient of the weight 2.
        self.flops_per_token = (6 if full else 4) * count_body(module)
        self.accelerator = make_accelerator(args)
        # Neither sharded nor scaled: accelerate's wrappers would do nothing but take time.
        self.bare = self.accelerator.scaler is None and backend.name in ("single", "ddp")
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.parameters: list[Any] = [p for p in module.parameters() if p.requires_grad]
        self._resting: bool | None = None

    # ---- before the first step ----

    def prepare(self, tokenizer: Any, total_steps: int, checkpoint: Path | None = None) -> None:
        """Wrap the model for its backend, make optimizer and schedule, and take up a checkpoint's state of them all.

        Raises:
            UsageError: the optimizer cannot be made for this model.
        """
        sharded = self.backend.name == "fsdp2"
        in_place = not (self.backend.deepspeed or sharded)
        if in_place:
            if getattr(self.module, "quantization_method", None) is None:
                self.module.to(self.device)
            if checkpoint is not None:
                self._take_weights(checkpoint)
        align_special_tokens(self.module, tokenizer)
        transformers_model(self.module).config.use_cache = self.args.use_cache
        if self.backend.deepspeed:
            from deepspeed.utils import logger  # pyright: ignore[reportMissingImports]

            # The "auto" values of its configuration; batch sizes are there already, since no loader is prepared.
            plugin: Any = self.accelerator.state.deepspeed_plugin
            plugin.hf_ds_config.trainer_config_finalize(self.args, self.module, total_steps)
            logger.setLevel(self.args.get_process_log_level())
        if sharded:
            # By decoder layers: some models name classes that they do not have, and accelerate gives up there.
            plugin: Any = self.accelerator.state.fsdp_plugin
            layers = {type(layer).__name__ for layer in decoder_layers(self.module)}
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or sorted(layers)
            plugin.cpu_ram_efficient_loading = False  # it would have the first rank load the whole model
        unread = unread_of(self.module)
        if sharded:
            for parameter in self.module.parameters():
                if hasattr(parameter, UNREAD):  # FSDP2 wants room for all of it: pages that nothing is written to
                    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
        try:
            optimizer = create_optimizer(self.module, self.args)
        except ValueError as error:  # the model lacks what `optim_target_modules` names, for one
            raise no_optimizer(self.args, error) from error
        self.wrapped, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        # accelerate's wrapper looks for a package on the disk in every step; only DeepSpeed and loss scaling need it.
        if self.bare or (sharded and self.accelerator.scaler is None):
            self.optimizer = self.optimizer.optimizer
        self.scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=self.args.get_warmup_steps(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        if sharded:
            self.module = self.wrapped
            read_shards(self.module, unread)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        if checkpoint is not None:
            if not in_place:
                self._take_weights(checkpoint)
            self._load_state(checkpoint)
        self.zero_gradients()
        self._resting = None

    def _take_weights(self, checkpoint: Path) -> None:
        """Those of a checkpoint of this run; DeepSpeed takes its optimizer's state with them."""
        if self.backend.deepspeed:
            deepspeed_load_checkpoint(self.wrapped, str(checkpoint), load_module_strict=self.full)
        elif self.backend.name == "fsdp2":
            plugin = self.accelerator.state.fsdp_plugin
            load_fsdp_model(plugin, self.accelerator, self.module, str(checkpoint), adapter_only=True)
        else:
            load_weights(self.module, checkpoint)

    def _load_state(self, checkpoint: Path) -> None:
        """What a checkpoint keeps besides the weights."""
        if self.backend.name == "fsdp2":
            plugin = self.accelerator.state.fsdp_plugin
            load_fsdp_optimizer(
                plugin, self.accelerator, self.optimizer, self.module, str(checkpoint), adapter_only=True
            )
        elif not self.backend.deepspeed:
            # Through the CPU, so that a GPU never holds the state twice; of many ranks, each loads onto its own GPU.
            device = self.device if self.ranks > 1 and self.device.type != "cpu" else "cpu"
            stored = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
            self.optimizer.load_state_dict(stored)
        self.scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
        if self.accelerator.scaler is not None and (checkpoint / "scaler.pt").is_file():
            self.accelerator.scaler.load_state_dict(torch.load(checkpoint / "scaler.pt", weights_only=True))
        schedule = self.scheduler
        if isinstance(schedule, LambdaLR):
            # A run that was prolonged goes on at the new schedule's rate: a checkpoint keeps that of the old one's end.
            parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in parts:
                group["lr"] = base * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    # ---- a step ----

    def train(self) -> None:
        """Dropout on, and the optimizer's training weights in place (schedule-free ones have two kinds)."""
        if self._resting is not False:
            self.wrapped.train()
            getattr(self.optimizer, "train", _nothing)()
            self._resting = False

    def rest(self) -> None:
        """Dropout off, and the weights that are evaluated and saved in place."""
        if self._resting is not True:
            self.wrapped.eval()
            getattr(self.optimizer, "eval", _nothing)()
            self._resting = True

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """All-reduce gradients after the last microbatch of a step only, where that costs no memory."""
        # DeepSpeed takes the optimizer's step at the end of the backward pass that this marks.
        self.accelerator.gradient_state.sync_gradients = last
        # Without the reduce-scatter FSDP2 keeps unsharded gradients: those of adapters are small.
        whole_gradients = self.backend.name == "fsdp2" and self.full
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if last or self.ranks == 1 or whole_gradients or each:
            return nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_type is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_type)

    def clip_gradients(self, max_norm: float) -> Tensor | float | None:
        """Scale the gradients down to `max_norm` (0: only measure them); their norm before, a scalar on the device.

        None where no gradient is left to measure. DeepSpeed's has been applied already.
        """
        most = max_norm if max_norm > 0 else math.inf
        if self.bare:
            return torch.nn.utils.clip_grad_norm_(self.parameters, most)
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, most)
        if self.backend.deepspeed and isinstance(norm, Tensor):
            return norm.item()
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def zero_gradients(self) -> None:
        if self.backend.deepspeed:
            self.wrapped.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None

    def learning_rate(self) -> float:
        """Of the step that comes next."""
        rate = self.optimizer.param_groups[0]["lr"] if self.waits_for_metric else self.scheduler.get_last_lr()[0]
        return rate.item() if isinstance(rate, Tensor) else rate

    def next_rate(self) -> None:
        """Step the schedule, unless it waits for a metric, or loss scaling skipped the step."""
        scales = self.accelerator.scaler is not None or self.backend.deepspeed
        skipped = scales and self.accelerator.optimizer_step_was_skipped
        if not (skipped or self.waits_for_metric):
            self.scheduler.step()

    def flops_of(self, totals: StepTotals) -> int:
        """This rank's share of a step's products."""
        return self.flops_per_token * totals.tokens // self.ranks

    @property
    def budget(self) -> int:
        """Tokens of a microbatch; 0 in the solo layout, where none fits beside another."""
        return 0 if self.solo else self.choices.tokens_per_microbatch

    @property
    def share(self) -> tuple[int, int]:
        """The number of this rank, and how many there are."""
        return self.args.process_index, self.ranks

    @property
    def waits_for_metric(self) -> bool:
        """Whether the schedule moves with an evaluation's metric, rather than with each step."""
        return isinstance(self.scheduler, (ReduceLROnPlateau, GreedyLR))

    # ---- ranks ----

    def highest(self, values: Tensor) -> list[int]:
        """All-reduce with max, (any,) int64; a collective."""
        if self.ranks > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values.tolist()

    def any_rank(self, answer: bool) -> bool:
        """Whether it is true on any rank; a collective."""
        if self.ranks == 1:
            return answer
        return bool(self.highest(torch.tensor([int(answer)], device=self.device))[0])

    def summed(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, on every rank."""
        if self.ranks == 1:
            return values
        summed: Any = self.accelerator.reduce(values, reduction="sum")
        return summed

    # ---- saving ----

    def save_weights(self, folder: Path, tokenizer: Any) -> None:
        """Write the files that one process would write, whatever the backend; a collective."""
        state = None
        if self.backend.deepspeed:
            # DeepSpeed's own way writes all weights beside an adapter, and tied ones twice.
            kept = [p for p in self.module.parameters() if self.full or p.requires_grad]
            gathering = gathered(self.backend, kept)
        else:
            gathering = nullcontext()
            if self.backend.name == "fsdp2":
                state = untied(self.accelerator.get_state_dict(self.module), self.module)
        with gathering:
            if not self.args.should_save:
                return
            self.module.save_pretrained(str(folder), state_dict=state)
            tokenizer.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")

    def save_optimizer(self, folder: Path) -> None:
        """optimizer.pt, or the shards that the backend writes in its place; every rank has to call it."""
        if self.backend.deepspeed:
            exclude = {} if self.full else {"exclude_frozen_parameters": True}
            self.wrapped.save_checkpoint(str(folder), **exclude)
        elif self.backend.name == "fsdp2":
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_model(plugin, self.accelerator, self.module, str(folder), adapter_only=True)
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.module, str(folder))
        elif self.args.should_save:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def save_schedule(self, folder: Path) -> None:
        """scheduler.pt and, where losses are scaled, scaler.pt."""
        if not self.args.should_save:
            return
        torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
        if self.accelerator.scaler is not None:
            torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def load_best(self, checkpoint: Path) -> None:
        """Take the weights of an earlier checkpoint of this run."""
        self.rest()  # or a schedule-free optimizer would take them for those that it trains
        self._take_weights(checkpoint)


def _nothing() -> None:
    """Most optimizers have one kind of weights."""


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """accelerate's part of a backend, as TrainingArguments describe it; it prepares no data loader."""
    config: Any = args.accelerator_config
    accumulation: dict[str, Any] = dict(config.gradient_accumulation_kwargs or {}) | {"num_steps": 1}
    sharding: Any = args.fsdp_plugin_args
    ddp: dict[str, Any] = {
        "find_unused_parameters": args.ddp_find_unused_parameters,
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        # No buffer changes in training; and ranks of the solo layout may call the model unequally often.
        "broadcast_buffers": bool(args.ddp_broadcast_buffers),
        "static_graph": args.ddp_static_graph,
    }
    plugin = None if sharding is None else FullyShardedDataParallelPlugin(**sharding)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        deepspeed_plugin=args.deepspeed_plugin,
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(**accumulation),
        kwargs_handlers=[
            DistributedDataParallelKwargs(**{name: value for name, value in ddp.items() if value is not None})
        ],
    )
    if plugin is not None and accelerator.state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate (1.15) silently skips the plugin on CPUs, and would train with DDP.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def create_optimizer(module: Any, args: TrainingArguments) -> Any:
    """The optimizer that `optim` names, on two groups: weights decay, biases and norms do not."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, module)
    if is_optimizer_factory(kind):  # Muon and Dion choose their groups themselves
        return kind()(module, **options)
    decaying = set(Trainer.get_decay_parameter_names(None, module))  # type: ignore[arg-type]
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups: Any = [
        {"params": [p for name, p in trained if name in decaying], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained if name not in decaying], "weight_decay": 0.0},
    ]
    groups = options.pop("params", groups)  # GaLore's
    optimizer = kind(groups, **options)
    if "bitsandbytes" in str(kind) and options.get("optim_bits") == 8:
        from bitsandbytes.optim import GlobalOptimManager  # pyright: ignore[reportPrivateImportUsage]

        # Of its own: the library's is the whole process's, and knows weights by numbers that others get later.
        manager = optimizer.mng = GlobalOptimManager.__new__(GlobalOptimManager)
        manager.initialize()
        for part in module.modules():
            if isinstance(part, torch.nn.Embedding):  # in 8 bit they do not converge
                manager.register_module_override(part, "weight", {"optim_bits": 32})
    return optimizer


def no_optimizer(args: TrainingArguments, error: Exception) -> UsageError:
    return UsageError(
        "config.optimizer",
        "optim = {value!r} cannot be built: {problem}",
        value=OptimizerNames(args.optim).value,
        problem=one_line(error),
    )


def untied(state: Any, module: Any) -> dict[str, Any]:
    """Gathered weights without the second names of tied ones: gathered apart, they no longer share their storage."""
    if hasattr(module, "peft_config"):
        return state
    kept = dict(state)
    for copied, source in module.all_tied_weights_keys.items():
        if copied in kept:
            tensor = kept.pop(copied)
            kept.setdefault(source, tensor)
    return kept


def read_shards(module: torch.nn.Module, unread: Mapping[str, Unread]) -> None:
    """Read this rank's rows of what has not been read into a model that FSDP2 has sharded."""
    parameters = dict(module.named_parameters())
    for name, weight in unread.items():
        shard: Any = parameters[name]
        assert tuple(shard.placements) == (Shard(0),), name
        each = -(-shard.shape[0] // shard.device_mesh.size())
        first = each * shard.device_mesh.get_local_rank()
        local = shard.to_local()
        if len(local):
            local.detach().copy_(weight.rows(first, first + len(local)))


def load_weights(module: Any, folder: Path) -> None:
    """Take a checkpoint's weights: an adapter's, or all of a model's in one file or several."""
    if hasattr(module, "peft_config"):
        module.load_adapter(str(folder), module.active_adapters[0], is_trainable=True)
    elif (folder / "model.safetensors").is_file():
        found = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        if found.missing_keys:
            module.tie_weights()
    else:
        load_sharded_checkpoint(module, str(folder), strict=False)
