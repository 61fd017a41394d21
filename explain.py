"""Write a web page that shows what a model attends to and what it predicts.

    python explain.py                                    # the newest run under out/
    python explain.py --out_dir=out/shakespeare_char --start="ROMEO: But soft, what light"
    python explain.py --init_from=gpt2 --start="The quick brown fox" --output=fox.html

The page is one file that needs no network. All its numbers come from the model: the scores are
computed as in attention_weights() of model.py. The page itself divides them by the square root of
the head's size, and computes softmax, temperature, top-k and top-p, nothing else. If the run has
saved snapshots (step_* folders; --snapshot_interval of train.py), a slider moves through training.
"""

import base64
import json
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import atomic_write, shown_path, user_path  # first: it says if torch is missing
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from configurator import ROOT, FolioError, PositiveInt, configure, run_main, wrap
from data.prepare import encode_prompt
from data.tokenizer import CharTokenizer, Tokenizer
from engine.changed_model import is_gpt2
from engine.checkpoint import load_model, load_model_and_tokenizer
from engine.hf_format import WEIGHTS_FILE
from engine.log_file import LOG_FILE, read_log
from engine.run_folder import (
    SETTINGS_FILE, chosen_model, read_run_settings, validation_split, weights_metadata,
)  # fmt: skip
from model import GPT, attention_weights

PAGE = ROOT / "engine" / "page"
MAX_TOKENS = 256  # a page of this length is still readable
MAX_SNAPSHOTS = 7  # of the training slider, beside the best weights
MAX_SCORES = 400_000  # q · k of all snapshots: fewer snapshots of a long text; a page of about 2 MB
MAX_LOGITS = 1000  # of a larger vocabulary, the page gets the logits of the likeliest tokens
MAX_CHANNELS = 16  # of a value or a message, the page shows the first numbers
TEMPERATURES = [round(0.1 * i, 1) for i in range(1, 21)]  # of the slider: 0.1, 0.2, ..., 2.0


@dataclass
class ExplainConfig:
    # --- Model and text ---
    out_dir: str = ""  # run folder, relative to Folio's folder; empty: the newest in out/
    init_from: str = ""  # instead of a run: gpt2, a name on the hub, or a folder
    start: str = ""  # the text; FILE:path reads a file; empty: the validation text
    max_tokens: PositiveInt = 64  # longer texts are cut after so many tokens
    # --- Output ---
    output: str = ""  # the file to write; empty: explain.html in the run folder, or in out/


def main() -> None:
    config = configure(ExplainConfig)
    folder = chosen_model(config.init_from, config.out_dir)
    title = config.init_from or shown_path(folder)
    print(f"the page of {title}")
    model, tokenizer = load_model_and_tokenizer(folder)
    model_is_gpt2 = is_gpt2(model)
    if not model_is_gpt2:
        print(wrap("model.py has been changed: the page computes attention weights as GPT-2 does"))
        title += " (model.py has been changed: attention weights as in GPT-2)"
    ids = choose_tokens(config, folder, tokenizer, model.config.block_size)
    scores_of_one = model.config.n_layer * model.config.n_head * len(ids) * (len(ids) + 1) // 2
    max_snapshots = min(max(MAX_SCORES // scores_of_one - 1, 1), MAX_SNAPSHOTS)
    snapshots = []
    for path in choose_folders(folder, max_snapshots):
        label = weights_label(path)
        print(f"computing {label or title}")
        snapshot = model if path == folder else load_model(path, vocab_size=tokenizer.vocab_size)
        try:
            page_data = explain(snapshot, ids)
        except AttributeError as error:
            if model_is_gpt2:
                raise
            raise FolioError(
                f"model.py has been changed, but the page needs all parts of GPT-2 ({error})"
            ) from None
        snapshots.append({"label": label, "selected": path == folder, **page_data})
    data = {
        "title": title,
        "token": "one character" if isinstance(tokenizer, CharTokenizer) else "a piece of text",
        "n_layer": model.config.n_layer,
        "n_head": model.config.n_head,
        "head_dim": model.config.n_embd // model.config.n_head,
        "ids": ids.tolist(),
        "vocab": visible_vocab(tokenizer, ids, snapshots),
        "temperatures": TEMPERATURES,
        "snapshots": snapshots,
    }
    output = output_path(config, folder)
    write_page(data, output)
    kilobytes = output.stat().st_size / 1000
    size = f"{kilobytes:.0f} kB" if kilobytes < 1000 else f"{kilobytes / 1000:.1f} MB"
    print(f"wrote a page of {size}; open it in a browser:")
    print(f"    {output.resolve().as_uri()}")


def choose_tokens(
    config: ExplainConfig, folder: Path, tokenizer: Tokenizer, block_size: int
) -> torch.Tensor:
    """The ids (T,) of --start, or of the beginning of the run's validation text."""
    limit = min(block_size, config.max_tokens)
    if config.max_tokens > MAX_TOKENS:
        raise FolioError(f"--max_tokens={config.max_tokens}: the page shows at most {MAX_TOKENS}")
    if config.start:
        ids = encode_prompt(config.start, tokenizer)[1]
    else:
        ids = validation_tokens(folder, tokenizer, limit)
    if len(ids) < 2:
        raise FolioError("--start: at least 2 tokens are needed, to predict one from the other")
    if len(ids) > limit:
        print(f"the page shows the first {limit} of {len(ids):,} tokens (--max_tokens, block_size)")
    return torch.from_numpy(np.asarray(ids[:limit], dtype=np.int64))


def validation_tokens(folder: Path, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """The first tokens of the validation text of a run. tokenizer: that of the run."""
    try:
        tokens = validation_split(run_of(folder), block_size=1, tokenizer=tokenizer)
    except FolioError as error:  # no run, or its dataset is not here or has changed
        raise FolioError(f"give a text with --start=...; no validation text: {error}") from None
    return np.asarray(tokens.shards[0][:count])


def run_of(folder: Path) -> Path:
    """The run folder of a snapshot (out/run/step_000500 -> out/run); any other folder itself."""
    is_snapshot = read_run_settings(folder) is None and read_run_settings(folder.parent) is not None
    return folder.parent if is_snapshot else folder


def choose_folders(folder: Path, max_snapshots: int) -> list[Path]:
    """Folders in the order of training: the best weights (the run folder) and snapshots.

    If there are more than max_snapshots snapshots (step_* folders), the function takes
    max_snapshots of them, at about equal distances.
    """
    folders = [path.parent for path in folder.glob(f"step_*/{WEIGHTS_FILE}")]
    folders = [path for path in folders if read_run_settings(path) is None]  # no runs
    # MetricsLogger renames a snapshot to step_000500.1 if training has repeated its steps.
    snapshots = {saved_step(path): path for path in folders if "." not in path.name}
    best_step = saved_step(folder)
    steps = sorted(snapshots.keys() - {best_step})  # a snapshot of this step has equal weights
    if len(steps) > max_snapshots:
        print(f"the page shows {max_snapshots} of {len(steps)} snapshots, to keep it small")
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, max_snapshots)]
    chosen = {best_step: folder} | {step: snapshots[step] for step in steps}
    return [chosen[step] for step in sorted(chosen)]


def saved_step(folder: Path) -> int:
    """The step after which these weights of a run were saved; -1 if the file does not say it."""
    return weights_metadata(folder).get("step", -1)


def weights_label(folder: Path) -> str:
    """'step 500 of 2,000, validation loss 1.8721'; empty if the weights are not from a run."""
    step, run = saved_step(folder), run_of(folder)
    if step < 0:
        return ""
    settings = read_run_settings(run)
    label = f"step {step:,}" + (f" of {settings['max_iters']:,}" if settings else "")
    # Snapshots do not say their loss. log.csv has it if this step was evaluated.
    losses = {row["step"]: row["val_loss"] for row in read_log(run / LOG_FILE)}
    loss = weights_metadata(folder).get("val_loss", losses.get(step))
    if loss is None:
        return f"{label}, not evaluated"
    best = " (best weights)" if folder == run else ""
    return f"{label}, validation loss {loss:.4f}{best}"


def output_path(config: ExplainConfig, folder: Path) -> Path:
    if config.output:
        return user_path(config.output)
    if config.init_from and not (folder / SETTINGS_FILE).exists():
        name = config.init_from.replace("/", "_").strip("._") or "model"
        return ROOT / "out" / f"explain_{name}.html"
    return folder / "explain.html"


# --- What the model computes ---


@torch.no_grad()
def explain(model: GPT, ids: torch.Tensor) -> dict[str, Any]:
    """Everything that the page shows of one model on the tokens ids (T,).

    scores: (n_layer, n_head, T (T + 1) / 2) q k^T before scaling, row by row; each row ends at the
        diagonal.
    values, messages: (n_layer, n_head, T, channels) the first channels of v and of weights @ v.
    """
    streams, logits = residual_streams(model, ids[None])  # (1, T, C) each; (1, T, V)
    if not (logits < math.inf).all():  # NaN, or too large. (A changed model may have -inf.)
        raise FolioError("the logits of this model are not finite: its training has diverged")
    losses = cross_entropy(logits[0, :-1], ids[1:], reduction="none").tolist()
    if math.inf in losses:
        raise FolioError("this model gives a token of the text the probability 0: infinite loss")
    scores, values, messages = [], [], []
    for block, x in zip(model.transformer.h, streams[:-1], strict=True):
        q, k, v = block.attn.qkv(block.ln_1(x))  # each (1, n_head, T, head_dim)
        scores.append(q[0] @ k[0].mT)
        values.append(v[0, ..., :MAX_CHANNELS])
        messages.append((attention_weights(q, k) @ v)[0, ..., :MAX_CHANNELS])
    # What the model would predict if it ended after 0, 1, 2, ... blocks.
    early_logits = [model.lm_head(model.transformer.ln_f(x)).float() for x in streams[:-1]]
    lower = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return {
        "scores": encode(torch.stack(scores)[:, :, lower]),
        "values": encode(torch.stack(values)),
        "messages": encode(torch.stack(messages)),
        "channels": values[0].size(-1),
        "losses": [rounded(loss) for loss in losses],
        **likeliest_logits(logits[0], ids),
        "layers": [predictions(each[0], ids) for each in (*early_logits, logits)],
    }


def residual_streams(model: GPT, idx: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """idx (1, T) -> the residual stream before each block and after the last one, (1, T, C) each;
    and the logits (1, T, V).

    Hooks record the inputs of the blocks and of the final layer norm while model(idx) computes
    them. So the page shows the computation of the model itself, also if model.py was changed.
    """
    streams: list[torch.Tensor] = []
    modules = [*model.transformer.h, model.transformer.ln_f]
    hooks = [m.register_forward_pre_hook(lambda _, args: streams.extend(args)) for m in modules]
    try:
        logits = model(idx).float()
    finally:
        for hook in hooks:
            hook.remove()
    shape = (*idx.shape, model.config.n_embd)
    if [stream.shape for stream in streams] != [shape] * len(modules):
        raise FolioError(
            "model.py has been changed, but the page needs a model that gives x (1, T, C) to each "
            "block once, and then to ln_f"
        )
    return streams, logits


def likeliest_logits(logits: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The logits of each position in descending order, and their ids.

    Of a large vocabulary, the page gets MAX_LOGITS tokens. All other tokens enter its softmax as
    one number for each temperature: the logarithm of the sum of exp(logit / temperature).
    """
    top = logits.topk(min(MAX_LOGITS, logits.size(-1)))
    rest = logits.scatter(1, top.indices, -math.inf)  # (T, V)
    tails = torch.stack([(rest / t).logsumexp(-1) for t in TEMPERATURES], dim=-1)
    return {
        "logits": {"float32": to_base64(top.values.numpy().astype("<f4"))},
        "logit_ids": top.indices.tolist(),
        "tails": [[None if math.isinf(x) else rounded(x) for x in row] for row in tails.tolist()],
    }


def predictions(logits: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """What logits (T, V) predict after the tokens ids (T,).

    For each position: the three likeliest ids, their probabilities, and the probability of the
    actual next token. For the whole text: the mean loss.
    """
    probs = logits.softmax(dim=-1)
    top = probs.topk(min(3, probs.size(-1)))
    actual = probs[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    return {
        "ids": top.indices.tolist(),
        "probs": [[rounded(p) for p in row] for row in top.values.tolist()],
        "actual": [*map(rounded, actual), None],  # the page has no token after the last one
        "mean_loss": cross_entropy(logits[:-1], ids[1:]).item(),
    }


def rounded(number: float) -> float:
    """The 7 digits that float32 has. The page rounds to fewer digits, once, when it shows them."""
    return float(f"{number:.7g}")


def encode(numbers: torch.Tensor) -> dict[str, Any]:
    """Numbers as 16-bit integers in base64, with the factor that restores them."""
    numbers = numbers.double().numpy()
    scale = float(np.abs(numbers).max(initial=0)) / 32767 or 1.0
    return {"scale": scale, "int16": to_base64(np.round(numbers / scale).astype("<i2"))}


def to_base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


# --- The page ---


def visible_vocab(
    tokenizer: Tokenizer, ids: torch.Tensor, snapshots: list[dict[str, Any]]
) -> dict[int, str]:
    """How each token that the page mentions is shown."""
    mentioned = set(ids.tolist())
    for snapshot in snapshots:
        mentioned.update(i for row in snapshot["logit_ids"] for i in row)
        mentioned.update(i for layer in snapshot["layers"] for row in layer["ids"] for i in row)
    return {i: visible(tokenizer.token_bytes(i)) for i in sorted(mentioned)}


def visible(token: bytes) -> str:
    """b' the\\n' -> '␣the↵'; bytes that are no complete character: b' \\xe2' -> '␣<E2>'."""
    text = token.decode("utf-8", errors="surrogateescape")  # such a byte: U+DC80 ... U+DCFF
    # An accent at the beginning would be drawn over the token before: it gets a circle to stand on.
    circle = "◌" if text and unicodedata.category(text[0]) in ("Mn", "Me") else ""
    return circle + "".join(map(visible_character, text))


def visible_character(c: str) -> str:
    names = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "<CR>"}
    if c in names:
        return names[c]
    if "\udc80" <= c <= "\udcff":
        return f"<{ord(c) - 0xDC00:02X}>"
    is_seen = c.isprintable() and c not in "\ufe0e\ufe0f"  # these two choose the style of an emoji
    return c if is_seen else f"<U+{ord(c):04X}>"


def write_page(data: dict[str, Any], output: Path) -> None:
    """Fill the page's data, style and program into its HTML, as one file."""
    html = (PAGE / "explain.html").read_text(encoding="utf-8")
    # "<" is written as \u003c, so that no text can end the script element that holds the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "/*STYLE*/": (PAGE / "explain.css").read_text(encoding="utf-8"),
        "/*PROGRAM*/": (PAGE / "explain.js").read_text(encoding="utf-8"),
        "/*DATA*/": text,
    }
    for mark, part in parts.items():
        html = html.replace(mark, part, 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:
        temporary.write_text(html, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
