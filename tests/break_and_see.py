"""Break GPT in one line, and see which lesson notices.

    python -m tests.break_and_see            # all of them, some minutes
    python -m tests.break_and_see mask scale # some, by a word of their titles

Each change is made to a copy of the repository, and the lesson that should notice is run there. It
has to fail; on the code as it is, it passes. (Needs pytest: pip install -e ".[dev]".)
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Change(NamedTuple):
    title: str
    file: str
    line: str  # what stands there, once
    instead: str
    lesson: str  # the test that notices


CHANGES = [
    Change(
        "without the mask", "model.py",
        "is_causal=T > 1", "is_causal=False",
        "test_model.py::test_no_message_travels_back_in_time",
    ),
    Change(
        "without the scale of the scores", "model.py",
        "is_causal=T > 1,", "is_causal=T > 1, scale=1.0,",
        "test_model.py::test_attention_equals_the_message_loop",
    ),
    Change(
        "without the residual around attention", "model.py",
        "x = x + self.attn(", "x = self.attn(",
        "test_model.py::test_both_phases_add_to_the_residual_stream",
    ),
    Change(
        "without the residual around the MLP", "model.py",
        "x = x + self.mlp(", "x = self.mlp(",
        "test_model.py::test_both_phases_add_to_the_residual_stream",
    ),
    Change(
        "without positions", "model.py",
        " + self.transformer.wpe.weight[start:end]", "",
        "test_model.py::test_without_positions_attention_ignores_order",
    ),
    Change(
        "with rows of a batch that talk", "model.py",
        "self.attn(self.ln_1(x), cache)", "self.attn(self.ln_1(x), cache).roll(1, 0)",
        "test_model.py::test_batch_rows_never_talk",
    ),
    Change(
        "with an MLP that looks at its neighbours", "model.py",
        "self.c_proj(F.gelu(self.c_fc(x)", "self.c_proj(F.gelu(self.c_fc(x.cumsum(1))",
        "test_model.py::test_the_mlp_thinks_about_each_node_alone",
    ),
    Change(
        "with another GELU", "model.py",
        'approximate="tanh"', 'approximate="none"',
        "test_model.py::test_gelu_is_the_published_tanh_form",
    ),
    Change(
        "with a head of its own", "model.py",
        "F.linear(x, self.transformer.wte.weight)",
        "F.linear(x, self.transformer.wte.weight.roll(1, 0))",
        "test_model.py::test_the_head_is_the_embedding_read_backwards",
    ),
    Change(
        "with projections that start too large", "model.py",
        'if "c_proj" in name else 1', "if False else 1",
        "test_model.py::test_the_start_is_that_of_the_gpt2_paper",
    ),
    Change(
        "with dropout while writing", "model.py",
        "self.dropout if self.training else 0.0", "self.dropout",
        "test_model.py::test_dropout_is_for_training_only",
    ),
    Change(
        "with padding that can be predicted", "model.py",
        "logits[..., self.config.vocab_size :] = -math.inf", "logits[..., :0] = -math.inf",
        "test_model.py::test_rows_that_pad_the_table_stay_silent",
    ),
    Change(
        "without cropping the context", "model.py",
        "return 0 if length <= block_size else", "return 0 if True else",
        "test_model.py::test_writing_can_go_on_forever",
    ),
    Change(
        "with cached nodes at the wrong position", "model.py",
        "start = caches[0].length if caches else 0", "start = 0",
        "test_model.py::test_a_cached_node_is_what_it_would_be_without_a_cache",
    ),
    Change(
        "with a shared prompt that is forgotten", "model.py",
        "self.v.narrow(2, self.length, T).copy_(v)",
        "self.v[0].narrow(1, self.length, T).copy_(v[0])",
        "test_model.py::test_a_prompt_that_all_texts_share_is_read_once",
    ),
    Change(
        "without temperature", "model.py",
        "logits.float() / temperature", "logits.float()",
        "test_model.py::test_temperature_sharpens_and_flattens",
    ),
    Change(
        "without the shift of the targets", "data/dataset.py",
        "windows[:, 1:].contiguous()", "windows[:, :-1].contiguous()",
        "test_dataset.py::test_targets_are_inputs_shifted_by_one",
    ),
    Change(
        "with the same batch for every micro-batch", "data/dataset.py",
        "default_rng([seed, step, micro_batch])", "default_rng([seed, step])",
        "test_dataset.py::test_the_same_seed_step_and_micro_batch_give_the_same_batch",
    ),
    Change(
        "without zeroing the gradients", "train.py",
        "run.optimizer.zero_grad(set_to_none=True)", "pass",
        "test_train.py::test_each_update_forgets_the_gradients_of_the_last",
    ),
    Change(
        "without the accumulation's division", "train.py",
        "part = batch_loss / accumulation", "part = batch_loss",
        "test_train.py::test_accumulated_micro_batches_are_one_mean",
    ),
    Change(
        "without warm-up", "train.py",
        "return min(climb, 1.0, descent)", "return min(1.0, descent)",
        "test_train.py::test_the_learning_rate_climbs_then_falls_to_zero",
    ),
    Change(
        "without the seed of a micro-batch", "train.py",
        "torch.manual_seed(seed_for(config.seed, run.step, micro_batch))", "pass",
        "test_train.py::test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit",
    ),
    Change(
        "without clipping", "train.py",
        "config.grad_clip or math.inf", "math.inf",
        "test_train.py::test_the_gradient_is_clipped_to_its_greatest_norm",
    ),
    Change(
        "with dropout in the evaluation", "train.py",
        "    run.model.eval()\n", "",
        "test_train.py::test_an_evaluation_drops_nothing_out",
    ),
    Change(
        "with the latest weights kept, not the best", "train.py",
        "    if best:\n", "    if True:\n",
        "test_train.py::test_the_folder_keeps_the_weights_of_the_lowest_validation_loss",
    ),
    Change(
        "with weights updated by a loss that is no number", "train.py",
        "    stop_if_not_finite(loss, grad_norm, run)\n", "",
        "test_train.py::test_a_loss_that_is_no_number_stops_before_the_weights_are_touched",
    ),
    Change(
        "with processes that do not add up", "train.py",
        "run.scaler.scale(part * world.size)", "run.scaler.scale(part)",
        "test_distributed.py::test_two_processes_train_as_one_does",
    ),
    Change(
        "without the rehearsal of many processes", "training/run.py",
        "world.rehearse(run.runner, config.batch_size, config.block_size)", "pass",
        "test_distributed.py::test_a_wish_to_stop_is_shared_and_resuming_goes_on_bit_by_bit",
    ),
    Change(
        "with queries, keys and values made orthogonal as one matrix", "training/optimizer.py",
        "count = 3 if rows == 3 * columns else 1", "count = 1",
        "test_optimizer.py::test_a_matrix_moves_alike_alone_and_in_company",
    ),
]  # fmt: skip


def main() -> None:
    if importlib.util.find_spec("pytest") is None:
        sys.exit('the lessons are run by pytest: pip install -e ".[dev]"')
    words = sys.argv[1:]
    chosen = [c for c in CHANGES if not words or any(word in c.title for word in words)]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "folio"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "*.bin", "weights"))
        for change in chosen:
            path = copy / change.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(broken(whole, change), encoding="utf-8")
            noticed, complaint = run_lesson(copy, change.lesson)
            path.write_text(whole, encoding="utf-8")
            unnoticed += not noticed
            name = change.lesson.split("::")[1].removeprefix("test_").replace("_", " ")
            print(f"{change.title} ({change.file})")
            print(f"    {'FAILS' if noticed else 'DOES NOT NOTICE'}: {name}")
            print(f"    {complaint}\n" if noticed else "", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} changes were noticed")
    sys.exit(1 if unnoticed else 0)


def broken(source: str, change: Change) -> str:
    """The source with the change made; ValueError if its line does not stand there once."""
    if source.count(change.line) != 1:
        raise ValueError(f"{change.title}: {change.line!r} is not once in {change.file}")
    return source.replace(change.line, change.instead)


def run_lesson(copy: Path, lesson: str) -> tuple[bool, str]:
    """Whether it fails, and its first line of complaint."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"tests/{lesson}"], cwd=copy, capture_output=True, text=True, timeout=300
    )
    complaints = [line for line in result.stdout.splitlines() if line.startswith("E ")]
    if result.returncode == 0 and "skipped" in result.stdout and "passed" not in result.stdout:
        return True, "(skipped on this system: it would fail elsewhere)"
    if result.returncode != 1 or not complaints:
        return False, ""
    return True, " ".join(complaints[0][1:].split())


if __name__ == "__main__":
    main()
