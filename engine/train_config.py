"""The settings of train.py, with their defaults and help texts."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from configurator import (
    FolioError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Range,
)
from engine.device import AutoBool, DeviceName, DTypeName


@dataclass
class TrainConfig:
    # --- Run ---
    out_dir: str = "out/gpt"  # run folder; a relative path starts at the repository
    init_from: str = (
        "scratch"  # scratch, resume, auto (resume if there is a run), gpt2, a hub name, or a folder
    )
    max_iters: NonNegativeInt = 2000  # optimizer steps
    eval_interval: PositiveInt = 250  # steps between evaluations
    checkpoint_interval: NonNegativeInt = 0  # steps between checkpoints; 0: at each evaluation
    eval_tokens: NonNegativeInt = 0  # validation tokens per evaluation (in whole windows); 0: all
    eval_only: bool = False  # evaluate the model given by init_from and exit; writes nothing
    patience: NonNegativeInt = 0  # stop after so many evaluations without improvement; 0: never
    snapshot_interval: NonNegativeInt = 0  # steps between copies of the weights in step_*; 0: none
    log_interval: PositiveInt = 10  # steps between rows of log.csv
    sample_tokens: NonNegativeInt = 160  # tokens of a sample printed after evaluations; 0: none
    sample_interval: PositiveInt = 1  # evaluations between two samples
    seed: NonNegativeInt = 1337  # random seed for weights, batches and dropout
    wandb_log: bool = False  # log to wandb, too (in a copied run folder, first delete wandb_id.txt)
    wandb_project: str = "folio"  # project on wandb
    wandb_run_name: str = ""  # name of the run on wandb; empty: the name of the run folder
    tensorboard: bool = (
        False  # log for TensorBoard, too, in the run folder (pip install tensorboard)
    )

    # --- Data ---
    dataset: str = "shakespeare_char"  # folder under data/
    tokenizer: Literal["dataset", "gpt2"] = (
        "dataset"  # the dataset's; gpt2: for a dataset without one, as nanoGPT's
    )
    batch_size: PositiveInt = 12  # sequences in a micro-batch
    block_size: PositiveInt = 64  # context length T, in tokens
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per step, over all processes

    # --- Model ---
    n_layer: PositiveInt = 4  # number of Transformer blocks
    n_head: PositiveInt = 4  # attention heads per block
    n_embd: PositiveInt = 128  # channels C, the size of an embedding; a multiple of n_head
    dropout: Probability = 0.0  # dropout probability
    bias: bool = False  # biases in linear layers and layer norms; GPT-2 has them
    pad_vocab_to: PositiveInt = 1  # round the number of embedding rows up to a multiple of this

    # --- Optimizer ---
    optimizer: Literal["muon", "adamw"] = "muon"  # for block matrices; other parameters: AdamW
    learning_rate: NonNegativeFloat = 5e-3  # peak learning rate of AdamW
    muon_learning_rate: NonNegativeFloat = 0.02  # peak learning rate of Muon
    warmup_iters: NonNegativeInt = 100  # steps of linear warmup: AdamW's first steps follow noise
    decay_lr: bool = True  # after warmup, decay the learning rate linearly until max_iters
    min_lr: NonNegativeFloat = (
        0.0  # AdamW's learning rate at the end of the decay; Muon's in proportion
    )
    weight_decay: NonNegativeFloat = 0.1  # for matrices and embeddings: keeps weights small
    beta1: Annotated[float, Range(0, 0.9999)] = 0.9  # decay rate of AdamW's mean of gradients
    beta2: Annotated[float, Range(0, 0.999999)] = 0.99  # the same for squared gradients
    grad_clip: NonNegativeFloat = 1.0  # maximum norm of the gradient; 0: no clipping

    # --- Device ---
    device: DeviceName = "auto"  # auto: cuda, else mps, else cpu
    dtype: DTypeName = "auto"  # of matrix products; auto: bfloat16 where the device is fast in it
    compile: AutoBool = "auto"  # use torch.compile; auto: only on cuda
    activation_checkpointing: bool = False  # compute activations twice instead of storing them all
    num_threads: NonNegativeInt = 0  # CPU threads; 0: all, fewer while other programs are busy

    replaced_settings: ClassVar[dict[str, str]] = {  # names in nanoGPT, and older names in Folio
        "lr_decay_iters": "the learning rate decays until max_iters",
        "eval_iters": "evaluation covers fixed windows; --eval_tokens limits them",
        "always_save_checkpoint": "resume.pt is always the latest, model.safetensors the best",
        "backend": "NCCL is used on CUDA, gloo on CPUs",
        "keep_every": "its name is now snapshot_interval",
    }

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            n_head = next(n for n in range(self.n_head, 0, -1) if self.n_embd % n == 0)
            n_embd = math.ceil(self.n_embd / self.n_head) * self.n_head
            raise FolioError(
                f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}; "
                f"try --n_head={n_head} or --n_embd={n_embd}"
            )
        if self.min_lr > self.learning_rate:
            raise FolioError(
                f"min_lr={self.min_lr} must not exceed learning_rate={self.learning_rate}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per optimizer step, over all processes."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size
