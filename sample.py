r"""Generate text with a trained GPT, token by token.

    python sample.py                                     # from the newest run in out/
    python sample.py --start="JULIET:" --num_samples=3
    python sample.py --start="JULIET:" --stop="\n\n"       # one speech: ends at an empty line
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt
    python sample.py --init_from=gpt2 --start="The sea"  # with the weights that OpenAI published
    python sample.py --interactive                       # type prompts, read continuations
    python sample.py --forever                           # Shakespeare without end, until Ctrl-C

Only the model's folder is needed, not the dataset. How tokens are sampled, and what happens when
the context is full, is in engine/inference.py; model.generate is its simplest form.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, ClassVar

import data  # noqa: F401 - first: it says what to do if torch is missing
import torch

from configurator import (
    FolioError,
    NonNegativeFloat,
    NonNegativeInt,
    Probability,
    Range,
    configure,
    for_terminal,
    run_main,
    wrap,
)
from data.prepare import encode_prompt
from data.tokenizer import Tokenizer
from engine.changed_model import CHANGED_MODEL_NOTE
from engine.checkpoint import is_changed, load_model_and_tokenizer
from engine.cpu_threads import ThreadAdapter, use_one_thread
from engine.device import DeviceName, DTypeName, choose_device, explain_out_of_memory
from engine.inference import InferenceModel, is_small, read_ids
from engine.run_folder import chosen_model, describe_run

SEPARATOR = "---------------"  # a line between two texts


@dataclass
class SampleConfig:
    # --- Model ---
    out_dir: str = (
        ""  # run folder; relative paths start at Folio's folder; empty: the newest in out/
    )
    init_from: str = ""  # model instead of a run: gpt2, ..., a name on the hub, or a folder
    # --- Text ---
    start: str = ""  # prompt (\n: newline), or FILE:path to read it from; empty: start of a text
    num_samples: Annotated[int, Range(1, 1000)] = 1  # samples, computed together
    max_new_tokens: NonNegativeInt = 500  # tokens per sample
    stop: str = ""  # end a sample before this text, such as "\n\n"
    interactive: bool = False  # read prompts from the terminal; Ctrl-D ends
    forever: bool = False  # generate until Ctrl-C
    # --- Sampling ---
    temperature: NonNegativeFloat = 0.8  # below 1 likely tokens become likelier; 0: greedy
    top_k: NonNegativeInt = 200  # only the k likeliest tokens; 0, or more than there are: all
    top_p: Probability = 1.0  # only the likeliest tokens that add up to this probability; 1: all
    seed: NonNegativeInt = 1337  # the same command with the same seed gives the same text
    # --- Device ---
    device: DeviceName = "auto"  # auto: cuda, else mps, else cpu
    dtype: DTypeName = "auto"  # precision of the weights; auto: the fastest
    compile: bool = False  # compile the model first: only for CUDA, and for long texts

    # If sample.py is given a config file of train.py, the error message has this advice.
    replaced_settings: ClassVar[dict[str, str]] = dict.fromkeys(
        ("max_iters", "dataset", "n_layer", "block_size"),
        "for train.py; to sample from a run: --out_dir=out/RUN",
    )

    def __post_init__(self):
        if self.init_from == "resume":  # nanoGPT's name for the weights in out_dir
            self.init_from = ""
        self.stop = self.stop.replace("\\n", "\n")  # a shell passes "\n" on as two characters
        if self.forever and (self.num_samples > 1 or self.interactive):
            raise FolioError("--forever works with one sample only, and not with --interactive")
        if self.forever and self.stop:
            raise FolioError("--forever: not with --stop, which ends a sample")
        if self.interactive and self.start:
            raise FolioError("--start: not with --interactive, which reads prompts")


def main() -> None:
    try:
        sample(configure(SampleConfig))
    except KeyboardInterrupt:
        print()  # ends the line with "^C" or with unfinished text
        raise


def sample(config: SampleConfig) -> None:
    """Load the model, and print its continuations of the prompts."""
    folder = chosen_model(config.init_from, config.out_dir)
    device = choose_device(config.device, config.dtype)
    if config.compile and not device.compile:
        raise FolioError(f"--compile: only for CUDA; here is {device.description}")
    with explain_out_of_memory("a smaller model, or --device=cpu"):
        model, tokenizer = load_model_and_tokenizer(folder)
        if config.num_samples == 1 and is_small(model):
            use_one_thread()  # as fast as two threads, and much faster beside other programs
        inference = InferenceModel(
            model, device.torch_device, config.dtype, config.num_samples, compile=config.compile
        )
        del model  # to free the weights of which `inference` has made copies
    generator = device.generator(config.seed)
    if config.interactive:
        prompts = read_prompts(tokenizer)
    else:
        prompts = [encode_prompt(config.start, tokenizer)]
    print(wrap(describe_run(folder)), file=sys.stderr)
    if inference.changed_model is not None:
        which = "a changed" if is_changed(folder) else "the unchanged"
        note = f"{CHANGED_MODEL_NOTE}; this model was saved with {which} model.py"
        print(wrap(note), file=sys.stderr)
    threads = ThreadAdapter(device)  # without a report: it would interrupt the text
    with explain_out_of_memory("fewer --num_samples, or --device=cpu"):
        for i, (prompt, ids) in enumerate(prompts):
            if i > 0 and not sys.stdin.isatty():  # in a terminal, "prompt: " stands between texts
                print(SEPARATOR)
            texts = generate_texts(config, inference, tokenizer, ids, generator)
            print_samples(prompt, texts, threads)


def read_prompts(tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """encode_prompt() of each line of standard input, until its end."""
    if sys.stdin is None:  # python sample.py --interactive <&-
        raise FolioError("--interactive: standard input is closed")
    is_terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        # A byte that is not UTF-8 becomes a character that is in no vocabulary, so encode() raises
        # an error that names it.
        encoding = None if is_terminal else "utf-8"  # a file or a pipe
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows does not have it
            import readline  # noqa: F401 - arrow keys edit the line, and bring back earlier ones
        print("type a prompt, then Enter; to end: Ctrl-D (Windows: Ctrl-Z, Enter)", file=sys.stderr)
    while True:
        try:
            yield encode_prompt(input("prompt: " if is_terminal else ""), tokenizer)
        except FolioError as error:
            print(wrap(str(error)), file=sys.stderr)
        except EOFError:
            if is_terminal:
                print()  # the next output begins below "prompt: "
            return


def generate_texts(
    config: SampleConfig,
    inference: InferenceModel,
    tokenizer: Tokenizer,
    ids: list[int],
    generator: torch.Generator,
) -> Iterator[Iterator[str]]:
    """Yield the samples one after another, each as pieces of text that come while it is generated.

    ids: of the prompt. A sample ends before an end-of-text token and before config.stop.
    """
    eos = None if config.forever else tokenizer.eos_token_id
    steps = inference.generate(
        torch.tensor([ids]).expand(config.num_samples, -1),  # (num_samples, T)
        None if config.forever else config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_tokens=() if eos is None else (eos,),
        generator=generator,
    )
    # read_ids() gives a list for each step: [id of sample 0, id of sample 1, ...]. Sample i takes
    # number i of each list, up to the end-of-text token: map(), then takewhile(). tee() keeps the
    # ids of later samples while sample 0 is printed.
    copies = itertools.tee(read_ids(steps), config.num_samples)
    for i, copy in enumerate(copies):
        sample_ids = itertools.takewhile(lambda token: token != eos, map(itemgetter(i), copy))
        yield until_stop(tokenizer.decode_stream(sample_ids, ids), config.stop)


def until_stop(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yield the pieces of a text up to the first `stop`, which may be spread over several pieces.

    An end of the text that may be the beginning of `stop` is kept until the next piece: stop "END"
    and the text "the EN" keep "EN".
    """
    pending = ""
    for piece in pieces:
        pending += piece
        before, found, _ = pending.partition(stop) if stop else (pending, "", "")
        if found:
            yield before
            return
        kept = next((n for n in range(len(stop) - 1, 0, -1) if pending.endswith(stop[:n])), 0)
        yield pending[: len(pending) - kept]
        pending = pending[len(pending) - kept :]
    yield pending


def print_samples(
    prompt: str, samples: Iterable[Iterable[str]], threads: ThreadAdapter | None = None
) -> None:
    """Print each sample behind the prompt, piece by piece, and a line between two samples.

    threads: adapted after each piece.
    Raises FolioError if standard output cannot be written, for example because a disk is full.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        for i, pieces in enumerate(samples):
            print(f"\n{SEPARATOR}\n" if i else "", prompt, sep="", end="", flush=True)
            for piece in pieces:
                print(for_terminal(piece) if is_terminal else piece, end="", flush=True)
                if threads:
                    threads.after_step()
        print()
    except BrokenPipeError:  # its reader has seen enough: python sample.py | head
        raise
    except OSError as error:
        raise FolioError(f"standard output cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
