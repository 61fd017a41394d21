"""Break the code in one line, and see that a test fails.

    python -m tests.mutation_check --list        # the titles of all mutations
    python -m tests.mutation_check mask shift    # titles with these words
    python -m tests.mutation_check               # all mutations: some minutes

Each mutation is made in a copy of the repository, and the test that should
detect it is run there. On the code as it is, that test passes. Needs pytest:
pip install -e ".[dev]"
"""

import difflib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

from configurator import FolioError, did_you_mean, run_main

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """A change of the code, and the test that detects it."""

    title: str
    file: str
    original: str  # occurs exactly once in the file
    replacement: str
    test: str  # file and name of a test in tests/
    meaning: str  # what it means that this test fails


MUTATIONS = [
    Mutation(
        "without the causal mask", "model.py",
        "else:\n            y = F.scaled_dot_product_attention(q, k, v, is_causal=True",
        "else:\n            y = F.scaled_dot_product_attention(q, k, v, is_causal=False",
        "test_model.py::test_attention_is_causal",
        "A position now sees the token that it has to predict. Training would copy this token: the "
        "loss would fall to almost 0, and generated text, which has no future, would be nonsense.",
    ),
    Mutation(
        "without the mask of attention_weights", "model.py",
        "if causal:", "if False:",
        "test_model.py::test_attention_weights_are_those_of_the_formula",
        "The table of weights has numbers above its diagonal: positions see their future.",
    ),
    Mutation(
        "without the scale of the scores", "model.py",
        "scores = scores / math.sqrt(q.size(-1))", "scores = scores / 1",
        "test_model.py::test_attention_weights_are_those_of_the_formula",
        "The scores are too large by a factor of sqrt(head_dim). The softmax is then almost "
        "one-hot, and its gradient almost zero.",
    ),
    Mutation(
        "without the residual connection around attention", "model.py",
        "x = x + self.attn(", "x = self.attn(",
        "test_model.py::test_attention_and_mlp_add_to_the_residual_stream",
        "A block replaces its input instead of adding to it. Gradients then have to pass through "
        "every sublayer, and deep models hardly learn.",
    ),
    Mutation(
        "without the residual connection around the MLP", "model.py",
        "x = x + self.mlp(", "x = self.mlp(",
        "test_model.py::test_attention_and_mlp_add_to_the_residual_stream",
        "A block replaces its input instead of adding to it. Gradients then have to pass through "
        "every sublayer, and deep models hardly learn.",
    ),
    Mutation(
        "without positions", "model.py",
        " + self.transformer.wpe(positions)", "",
        "test_model.py::test_without_position_embeddings_one_block_ignores_order",
        "The model cannot tell 'dog bites man' from 'man bites dog'.",
    ),
    Mutation(
        "with sequences of a batch that exchange information", "model.py",
        "self.attn(self.ln_1(x))", "self.attn(self.ln_1(x)).roll(1, 0)",
        "test_model.py::test_sequences_of_a_batch_are_independent",
        "What the model says about one text depends on the other texts of its batch.",
    ),
    Mutation(
        "with an MLP that sees earlier tokens", "model.py",
        "self.c_fc(x)", "self.c_fc(x.cumsum(1))",
        "test_model.py::test_the_mlp_processes_each_token_alone",
        "The MLP also exchanges information between tokens. That is the task of attention alone.",
    ),
    Mutation(
        "with another GELU", "model.py",
        'approximate="tanh"', 'approximate="none"',
        "test_model.py::test_gelu_is_the_tanh_form_of_gpt2",
        "OpenAI's weights were trained with the tanh form. With the exact form the logits differ "
        "slightly from the results of GPT-2.",
    ),
    Mutation(
        "with an output layer whose rows are shifted by one", "model.py",
        "F.linear(x, self.transformer.wte.weight)",
        "F.linear(x, self.transformer.wte.weight.roll(1, 0))",
        "test_model.py::test_lm_head_is_tied_to_the_embedding",
        "The logit of a token is computed from the embedding of its neighbor in the vocabulary.",
    ),
    Mutation(
        "with projections that are initialized too large", "model.py",
        'math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1', "1",
        "test_model.py::test_weights_are_initialized_as_in_the_gpt2_paper",
        "The residual stream grows with the number of layers, and training starts less stably.",
    ),
    Mutation(
        "with dropout during generation", "model.py",
        "dropout = self.dropout if self.training else 0.0", "dropout = self.dropout",
        "test_model.py::test_dropout_is_active_in_training_only",
        "The same input gives other logits each time, and worse ones.",
    ),
    Mutation(
        "with padded rows that can be predicted", "model.py",
        "return logits[..., :V]", "return logits",
        "test_model.py::test_padded_rows_of_the_vocabulary_take_no_part",
        "The model can predict ids that stand for no token.",
    ),
    Mutation(
        "without cropping the context", "model.py",
        "context = idx[:, -self.config.block_size :]", "context = idx",
        "test_model.py::test_generate_appends_the_likeliest_token_of_the_cropped_context",
        "Generation ends with an error as soon as the text is longer than block_size.",
    ),
    Mutation(
        "without temperature", "model.py",
        ".float() / temperature", ".float()",
        "test_model.py::test_temperature_divides_the_logits",
        "Every temperature gives the same text as temperature 1.",
    ),
    Mutation(
        "without dropping old tokens from a full cache", "engine/inference.py",
        "return 0 if length <= block_size else", "return 0 if True else",
        "test_inference.py::test_a_full_context_keeps_its_latest_tokens",
        "Generation ends with an error as soon as the text is longer than block_size.",
    ),
    Mutation(
        "with cached tokens at the wrong positions", "engine/inference.py",
        "weights.wpe[start:end]", "weights.wpe[:T]",
        "test_inference.py::test_a_step_with_the_cache_gives_the_logits_of_the_model",
        "With a cache, every new token gets the position embedding of the first token, and the "
        "text differs from that of model.generate.",
    ),
    Mutation(
        "with a shared prompt that only the first sample has", "engine/inference.py",
        ".copy_(qkv[1:])\n", "[:, : qkv.size(1)].copy_(qkv[1:])\n",
        "test_inference.py::test_generates_the_tokens_of_model_generate_for_rows_with_one_prompt",
        "All samples except the first continue a prompt that was never computed for them.",
    ),
    Mutation(
        "without the shift of the targets", "data/dataset.py",
        "windows[:, 1:]", "windows[:, :-1]",
        "test_dataset.py::test_targets_are_inputs_shifted_by_one",
        "The model learns to repeat the token it has just read instead of predicting the next.",
    ),
    Mutation(
        "with the same batch for every micro-batch", "data/dataset.py",
        "default_rng([seed, step, micro_batch])", "default_rng([seed, step])",
        "test_dataset.py::test_training_batch_is_a_function_of_seed_step_and_micro_batch",
        "Accumulating gradients over micro-batches has no use: they all hold the same tokens.",
    ),
    Mutation(
        "without clearing the gradients", "train.py",
        "optimizer.zero_grad(set_to_none=dist.world_size == 1)", "pass",
        "test_train.py::test_each_step_starts_without_the_gradients_of_the_last",
        "Each step also repeats the gradients of all earlier steps.",
    ),
    Mutation(
        "without the division by the number of micro-batches", "train.py",
        "loss / len(micro_batches)", "loss",
        "test_train.py::test_micro_batches_are_averaged",
        "The gradient is the sum over the micro-batches instead of their mean, so that it grows "
        "with their number.",
    ),
    Mutation(
        "without warmup", "train.py",
        "return min(warmup, 1.0, floor", "return min(1.0, floor",
        "test_train.py::test_the_learning_rate_warms_up_then_decays_to_zero",
        "The first steps, whose gradients say little, are as large as the later ones.",
    ),
    Mutation(
        "without the seed of a micro-batch", "train.py",
        "device.manual_seed(derive_seed(config.seed, step, micro_batch))", "pass",
        "test_train.py::test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit",
        "After resuming, dropout uses other random numbers than the uninterrupted run.",
    ),
    Mutation(
        "without gradient clipping", "train.py",
        "config.grad_clip or math.inf", "math.inf",
        "test_train.py::test_the_gradient_is_clipped",
        "One unusual batch can change the weights so much that training does not recover.",
    ),
    Mutation(
        "with dropout in the evaluation", "train.py",
        "    model.eval()\n    dist.broadcast", "    dist.broadcast",
        "test_train.py::test_evaluation_uses_no_dropout",
        "The validation loss is measured on a model with random parts switched off: it is too "
        "large, and different each time.",
    ),
    Mutation(
        "with the latest weights kept, not the best", "train.py",
        "    if (state.best_step, state.best_val_loss) == (state.step, val_loss):", "    if True:",
        "test_train.py::test_the_folder_keeps_the_weights_of_the_lowest_validation_loss",
        "A model that overfits at the end replaces better weights.",
    ),
    Mutation(
        "with weights updated by a NaN loss", "train.py",
        "    if math.isfinite(loss) and math.isfinite(grad_norm):\n", "    if True:\n",
        "test_train.py::test_a_nan_loss_stops_before_the_weights_change",
        "One NaN loss makes every weight NaN: the model is lost.",
    ),
    Mutation(
        "with processes whose gradients are averaged twice", "train.py",
        "loss / len(micro_batches)", "loss / config.gradient_accumulation_steps",
        "test_distributed.py::test_several_processes_train_like_one",
        "Two processes train with half the gradient of one.",
    ),
    Mutation(
        "without the warm-up of DistributedDataParallel", "engine/run.py",
        "dist.warm_up_ddp(wrapped, dummy_loss)", "pass",
        "test_distributed.py::test_signal_to_one_process_stops_all_and_resume_is_exact",
        "DistributedDataParallel adds up gradients in another order in its first step than later. "
        "A resumed run then differs from an uninterrupted one in the last digits.",
    ),
    Mutation(
        "with queries, keys and values orthogonalized as one matrix", "engine/optimizer.py",
        "n_chunks = 3 if rows == 3 * columns else 1", "n_chunks = 1",
        "test_optimizer.py::test_a_batched_update_equals_updates_one_at_a_time",
        "Muon treats three different matrices as one.",
    ),
]  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    if words in (["--help"], ["-h"]):
        print(__doc__.strip())
        return
    if words == ["--list"]:
        print("\n".join(mutation.title for mutation in MUTATIONS))
        return
    chosen = choose(words)
    if importlib.util.find_spec("pytest") is None:
        raise FolioError('tests are run by pytest, which is missing: pip install -e ".[dev]"')
    tested = detected = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "folio"
        ignored = shutil.ignore_patterns(
            ".*", "out", "runs", "venv", "env", "*.bin", "*.pt", "*.safetensors", "*.jsonl"
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutation in chosen:
            running = indent(f"running {mutation.test}, for up to half a minute")
            print(f"{mutation.title}\n{changed_lines(mutation)}\n{running}", flush=True)
            failure = run_mutated(copy, mutation)
            if failure == "":
                print("    SKIPPED: this system lacks what the test needs\n", flush=True)
                continue
            tested += 1
            if failure is None:
                print("    PASSED: the mutation is NOT detected\n", flush=True)
                continue
            detected += 1
            print(f"{indent(f'FAILED: {failure[:300]}')}\n{indent(mutation.meaning)}\n", flush=True)
    print(f"{detected} of {tested} mutations were detected")
    sys.exit(0 if detected == tested else 1)


def choose(words: list[str]) -> list[Mutation]:
    """The mutations whose titles contain one of the words; all without words."""
    for word in words:
        if not any(word in mutation.title for mutation in MUTATIONS):
            words_of_titles = {word for mutation in MUTATIONS for word in mutation.title.split()}
            guess = did_you_mean(word, {w for w in words_of_titles if len(w) > 3}) or ";"
            raise FolioError(f"no title contains {word!r}{guess} --list shows all titles")
    return [m for m in MUTATIONS if not words or any(word in m.title for word in words)]


def mutate(source: str, mutation: Mutation) -> str:
    """The mutated source; ValueError if the original does not occur exactly once."""
    if source.count(mutation.original) != 1:
        times = source.count(mutation.original)
        raise ValueError(
            f"{mutation.title}: {mutation.original!r} occurs {times} times in {mutation.file}"
        )
    return source.replace(mutation.original, mutation.replacement)


def changed_lines(mutation: Mutation) -> str:
    """The changed lines, before (-) and after (+)."""
    before = (ROOT / mutation.file).read_text(encoding="utf-8")
    pairs = zip(before.splitlines(), mutate(before, mutation).splitlines(), strict=False)
    number = next(n for n, (old, new) in enumerate(pairs, start=1) if old != new)
    lines = [
        textwrap.fill(
            f"{line[0]} {line[2:].strip()}", 79, initial_indent=" " * 4, subsequent_indent=" " * 6,
            break_long_words=False, break_on_hyphens=False,
        )
        for line in difflib.ndiff(before.splitlines(), mutate(before, mutation).splitlines())
        if line[0] in "-+"
    ]  # fmt: skip
    return "\n".join([f"    {mutation.file}, line {number}", *lines])


def run_mutated(copy: Path, mutation: Mutation) -> str | None:
    """Run the test on the mutated copy. Returns why it fails; None: it passes; "": skipped."""
    path = copy / mutation.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutate(source, mutation), encoding="utf-8")
    try:
        result = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-x", "-rs", "-n0", "-p", "no:cacheprovider",
                mutation.test,
            ],
            cwd=copy / "tests", capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        path.write_text(source, encoding="utf-8")
    errors = [line for line in result.stdout.splitlines() if line.startswith("E ")]
    if "skipped" in result.stdout and "passed" not in result.stdout and not errors:
        return ""
    if result.returncode == 0:
        return None
    if result.returncode != 1 or not errors:
        raise FolioError(f"{mutation.test} could not be run: {result.stdout[-500:]}{result.stderr}")
    return " ".join(errors[0][1:].split())


def indent(text: str) -> str:
    return textwrap.fill(
        text, 79, initial_indent=" " * 4, subsequent_indent=" " * 4, break_long_words=False
    )


if __name__ == "__main__":
    run_main(main)
