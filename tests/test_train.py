"""Training: the same numbers every time, nothing lost, and a text learned as well as it can be."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from configurator import FolioError, given_settings
from data.prepare import split_text, write_dataset
from data.tokenizer import BPETokenizer, CharTokenizer
from tests.conftest import ROOT, assert_one_line_error, run_script
from tests.test_tokenizer import toy_bpe
from train import TrainConfig, begin, evaluate, learning_rate_share
from training.checkpoint import (
    RESUME, SETTINGS, WEIGHTS, load_model, load_resume, save_resume,
)  # fmt: skip
from training.run import Run, plan
from training.world import World


@pytest.fixture
def run_in_process(call):
    """Train with these flags, successfully; what was printed comes back."""

    def trained(*flags: str) -> str:
        result = call(train, *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return trained


def training_for(*flags: str) -> Run:
    return begin(TrainConfig, given_settings(TrainConfig, list(flags)), World())


def log_of(folder) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_clock(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


# --- The schedule ---


def test_the_learning_rate_climbs_then_falls_to_zero():
    config = TrainConfig(max_iters=10, warmup_iters=2)
    shares = [learning_rate_share(step, config) for step in range(10)]
    assert shares == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert learning_rate_share(0, TrainConfig(max_iters=1, warmup_iters=0)) == 1
    assert learning_rate_share(0, TrainConfig(max_iters=1, warmup_iters=5)) == 1 / 5


# --- One run ---


def test_a_run_makes_exactly_max_iters_updates_and_leaves_its_record(
    tiny, tmp_path, run_in_process
):
    told = run_in_process(*tiny)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "settings.json", "resume.pt", "log.csv", "loss.png",
    }  # fmt: skip
    rows = log_of(folder)
    assert list(rows[0]) == [
        "step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm",
        "tokens_per_second", "bits_per_byte",
    ]  # fmt: skip
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6, 8]
    assert [int(row["tokens"]) for row in rows] == [32 * s for s in (0, 2, 4, 6, 8)]
    assert [bool(row["val_loss"]) for row in rows] == [True, False, True, False, True]
    assert load_resume(folder)["step"] == 8
    assert "8 of 8 steps" in told
    assert "python sample.py" in told
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_keeps_the_weights_of_the_lowest_validation_loss(
    tiny, tmp_path, run_in_process, monkeypatch
):
    losses, seen = iter([3.0, 1.0, 2.0]), []

    def pretended(run):
        seen.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        return next(losses), 1.0

    monkeypatch.setattr(train, "evaluate", pretended)
    told = run_in_process(*tiny)
    assert "step 8: validation loss 2.0000 (1.000 bits per byte), the best was 1.0000" in told
    assert load_resume(tmp_path / "run")["best_val_loss"] == 1.0
    for name, kept in load_model(tmp_path / "run").named_parameters():
        assert torch.equal(kept, seen[1][name]), name
        assert not torch.equal(kept, seen[2][name]), name


def test_the_loss_over_the_validation_data_is_that_of_every_token_once(tiny):
    run = training_for(*tiny, "--eval_tokens=0", "--dtype=float64")
    stream, T = run.dataset.val, run.config.block_size
    surprise, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, T):
            first = min(start, len(stream) - 1 - T)  # the last window reaches back to be whole
            window = torch.from_numpy(stream.windows(np.array([first]), T + 1))
            logits, _ = run.model(window[:, :-1])
            losses = -torch.log_softmax(logits[0], dim=-1)[torch.arange(T), window[0, 1:]]
            surprise += losses[start - first :].sum().item()
            count += T - (start - first)
    assert count == len(stream) - 1
    loss, bits_per_byte = evaluate(run)
    assert loss == pytest.approx(surprise / count, rel=1e-12)
    assert bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-12)  # a byte a character


def test_bits_per_byte_count_the_bytes_of_the_tokens_predicted(tiny, tmp_path):
    text = "low lower é 🙂\n" * 90  # with tokens of one byte, of several, and of none
    pieces = {"train": [text, None], "val": [text, None]}
    write_dataset(tmp_path / "bpe", toy_bpe(), pieces, {"source": "a test"})
    run = training_for(*tiny, f"--dataset={tmp_path / 'bpe'}", "--eval_tokens=0")
    loss, bits_per_byte = evaluate(run)
    ids = toy_bpe().encode(text)
    predicted = text.encode()[len(toy_bpe().token_bytes(ids[0])) :]  # all but the first token
    nats = loss * len(ids)  # the end-of-text token is predicted too
    assert bits_per_byte == pytest.approx(nats / math.log(2) / len(predicted), rel=1e-9)


def test_accumulated_micro_batches_are_one_mean(tiny):
    run = training_for(*tiny, "--dtype=float64", "--gradient_accumulation_steps=3")
    batches = list(zip(range(3), train.training_batches(run), strict=False))
    losses = [run.model(*batch)[1] for _, batch in batches]
    mean = sum(losses) / 3
    mean.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in run.model.parameters()))
    run.model.zero_grad()
    done = train.update(run, (batch for _, batch in batches))
    assert done.loss == pytest.approx(mean.item(), rel=1e-12)
    assert done.grad_norm == pytest.approx(norm, rel=1e-9)


def test_each_update_forgets_the_gradients_of_the_last(tiny):
    """Where nothing is learned, the same batch twice has the same gradient twice."""
    still = ("--learning_rate=0", "--muon_learning_rate=0", "--dtype=float64")
    run = training_for(*tiny, *still)
    batch = next(train.training_batches(run))
    first, second = (train.update(run, iter([batch])) for _ in range(2))
    assert second.grad_norm == first.grad_norm


def test_an_evaluation_drops_nothing_out(tiny):
    run = training_for(*tiny, "--dropout=0.5", "--dtype=float64")
    dropped = training_for(*tiny, "--dropout=0", "--dtype=float64")
    assert evaluate(run) == evaluate(run) == evaluate(dropped)
    assert run.model.training  # and goes on training


# --- The same numbers ---


WILD = ("--dropout=0.2", "--gradient_accumulation_steps=2")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    tiny, tmp_path, run_in_process, optimizer
):
    wild = (*WILD, f"--optimizer={optimizer}")
    run_in_process(*tiny, *wild)
    whole, part = tmp_path / "run", tmp_path / "part"
    flags = [*tiny, *wild, f"--out_dir={part}"]
    stop_after(3, flags)
    assert load_resume(part)["step"] == 3
    run_in_process(*flags, "--init_from=resume")
    assert_same_state(load_resume(whole), load_resume(part))
    assert_same_state(load_file(whole / WEIGHTS), load_file(part / WEIGHTS))
    assert without_clock(log_of(whole)) == without_clock(log_of(part))


def stop_after(steps: int, flags: list[str]) -> None:
    """Run train.py, and wish it to stop while update number `steps` is being made."""
    script = (
        "import os, signal, sys, train\n"
        "real = train.update\n"
        "def update(run, batches):\n"
        f"    if run.step == {steps} - 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(run, batches)\n"
        "train.update = update\n"
        "train.run_main(train.main)\n"
    )
    stopped = run_script("-c", script, *flags)
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped, and saved" in stopped.stdout
    assert "--init_from=resume" in stopped.stdout


def assert_same_state(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key in left.keys() - {"seconds"}:
        if isinstance(left[key], dict):
            assert_same_state(left[key], right[key])
        elif isinstance(left[key], torch.Tensor):
            assert torch.equal(left[key], right[key]), key
        else:
            assert left[key] == right[key], key


def test_evaluations_and_samples_change_nothing(tiny, tmp_path, run_in_process):
    run_in_process(*tiny, *WILD)
    other = tmp_path / "other"
    run_in_process(
        *tiny, *WILD, f"--out_dir={other}", "--eval_interval=3", "--sample_tokens=0",
        "--log_interval=1", "--eval_tokens=8",
    )  # fmt: skip
    left, right = load_resume(tmp_path / "run"), load_resume(other)
    assert_same_state(left["model"], right["model"])
    assert_same_state(left["optimizer"], right["optimizer"])


def test_another_seed_is_another_run(tiny):
    first, same, other = (training_for(*tiny, f"--seed={seed}") for seed in (1, 1, 2))
    weights = [run.model.transformer.wte.weight for run in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    batches = [next(train.training_batches(run))[0] for run in (first, same, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


# --- Learning ---


def test_a_markov_text_is_learned_to_its_entropy(tmp_path, run_in_process):
    """Each letter depends on the one before it alone: how well it can be predicted is known."""
    dice = np.random.default_rng(0)
    letters = 6
    chances = dice.dirichlet(np.full(letters, 0.2), size=letters)  # row: what follows a letter
    text, letter = [], 0
    for u in dice.random(60_000):
        letter = int(np.searchsorted(chances[letter].cumsum(), u).clip(max=letters - 1))
        text.append("abcdef"[letter])
    share = np.linalg.matrix_power(chances, 200)[0]  # of each letter, in the long run
    entropy = -(share[:, None] * chances * np.log(chances)).sum()  # nats per letter

    text = "".join(text)
    write_dataset(tmp_path / "markov", CharTokenizer.of(text), split_text(text), {"source": "dice"})
    run_in_process(
        f"--dataset={tmp_path / 'markov'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu",
        "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=32",
        "--max_iters=250", "--eval_interval=250", "--learning_rate=1e-2", "--sample_tokens=0",
    )  # fmt: skip
    first, last = (float(row["val_loss"]) for row in log_of(tmp_path / "run") if row["val_loss"])
    assert first == pytest.approx(math.log(letters), rel=0.05)  # it begins by guessing
    assert last == pytest.approx(entropy, rel=0.03)  # and ends knowing all there is to know
    assert entropy < 0.75 * math.log(letters)


# --- Going on, starting anew ---


def test_auto_resumes_where_there_is_a_run_and_begins_one_where_there_is_none(
    tiny, tmp_path, run_in_process
):
    run_in_process(*tiny, "--init_from=auto", "--max_iters=4")
    told = run_in_process(*tiny, "--init_from=auto", "--max_iters=6")
    assert "resuming with max_iters = 6, until now 4" in told
    assert "from step 4" in told
    assert load_resume(tmp_path / "run")["step"] == 6


def test_resuming_remembers_the_settings_the_run_was_begun_with(tiny, tmp_path, run_in_process):
    run_in_process(*tiny)
    run_in_process(f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=9")
    settings = json.loads((tmp_path / "run" / SETTINGS).read_text())
    assert (settings["n_embd"], settings["max_iters"]) == (16, 9)


def test_resuming_refuses_another_architecture_or_dataset(tiny, run_in_process, call):
    run_in_process(*tiny)
    for flag in ("--n_layer=3", "--block_size=16", "--bias", "--dataset=other"):
        result = call(train, *tiny, flag, "--init_from=resume")
        assert_one_line_error(result, flag.partition("=")[0], "cannot change")


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path, run_in_process):
    run_in_process(*tiny)
    before = (tmp_path / "run" / RESUME).read_bytes()
    told = run_in_process(*tiny, "--init_from=resume")
    assert "8 of 8 steps" in told
    assert (tmp_path / "run" / RESUME).read_bytes() == before


def test_scratch_moves_the_old_run_aside(tiny, tmp_path, run_in_process):
    run_in_process(*tiny)
    told = run_in_process(*tiny)
    assert "run.1" in told
    assert (tmp_path / "run.1" / WEIGHTS).exists()


def test_resuming_cuts_the_log_back_to_its_step(tiny, tmp_path, run_in_process):
    run_in_process(*tiny)
    log = tmp_path / "run" / "log.csv"
    whole = log.read_text()
    log.write_text(whole + "9,288,1,1.0,,1e-3,1.0,100\n10,32")  # of work that a kill lost
    run_in_process(*tiny, "--init_from=resume")
    assert without_clock(log_of(tmp_path / "run")) == without_clock(
        csv.DictReader(whole.splitlines())
    )


def test_finetuning_takes_the_architecture_of_the_weights(tiny, tmp_path, run_in_process, rhyme):
    run_in_process(*tiny)
    told = run_in_process(
        f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'tuned'}", f"--dataset={rhyme}",
        "--max_iters=1", "--block_size=4", "--dropout=0.1", "--device=cpu",
    )  # fmt: skip
    assert "from the weights in" in told
    tuned = load_model(tmp_path / "tuned").config
    assert (tuned.n_embd, tuned.block_size) == (16, 4)


def test_finetuning_refuses_a_tokenizer_that_is_not_the_models(
    tiny, tmp_path, run_in_process, call
):
    run_in_process(*tiny)
    text = "".join(map(chr, range(40, 64))) * 20  # other letters, though as many
    write_dataset(tmp_path / "b", CharTokenizer.of(text), split_text(text), {"source": "b"})
    result = call(
        train, f"--init_from={tmp_path / 'run'}", f"--dataset={tmp_path / 'b'}",
        f"--out_dir={tmp_path / 'tuned'}",
    )  # fmt: skip
    assert_one_line_error(result, "its tokenizer is not the one")
    assert not (tmp_path / "tuned").exists()


def test_eval_only_tells_the_loss_and_touches_nothing(tiny, tmp_path, run_in_process, capsys):
    run_in_process(*tiny)
    folder = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    told = run_in_process(*tiny, "--eval_only", "--init_from=resume")
    assert f"validation loss {float(log_of(folder)[-1]['val_loss']):.4f}" in told
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    another = training_for(*tiny, "--eval_only")
    another.world.rank = 1
    train.evaluate_only(another)
    assert capsys.readouterr().out == ""  # only the main process speaks
    told = run_in_process(*tiny, "--eval_only", f"--out_dir={tmp_path / 'none'}")
    assert "untrained" in told
    assert not (tmp_path / "none").exists()


# --- Stopping ---


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_ctrl_c_finishes_the_step_saves_and_leaves(tiny, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", *tiny, "--max_iters=1000000", "--eval_interval=1000000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopped, and saved" in out
    assert load_resume(tmp_path / "run")["step"] > 0


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(tiny):
    run = training_for(*tiny)
    with torch.no_grad():
        run.model.transformer.ln_f.weight[0] = math.nan
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(FolioError, match=r"step 0: the loss is nan"):
        train.update(run, train.training_batches(run))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_touched(tiny):
    run = training_for(*tiny)
    run.model.transformer.ln_f.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(FolioError, match=r"step 0: the loss is \d.*gradient's norm (inf|nan)"):
        train.update(run, train.training_batches(run))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


# --- Precision ---


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_precision_trains(tiny, dtype, optimizer):
    run = training_for(*tiny, f"--dtype={dtype}", f"--optimizer={optimizer}")
    before, _ = evaluate(run)
    batches = train.training_batches(run)
    for run.step in range(8):
        train.update(run, batches)
    assert evaluate(run)[0] < before - 0.05
    wanted = torch.float64 if dtype == "float64" else torch.float32
    assert {p.dtype for p in run.model.parameters()} == {wanted}


def test_the_root_of_the_disk_is_no_folder_for_a_run(tiny, call):
    assert_one_line_error(call(train, *tiny, "--out_dir=/"), "--out_dir=/: no folder for a run")


def test_a_corpus_that_is_not_there_is_told_how_to_fetch(tiny, call, data_folder):
    assert_one_line_error(
        call(train, *tiny, "--dataset=fineweb"), "python -m data.prepare_fineweb --shards=100"
    )


def test_a_plan_settles_where_the_weights_come_from(tiny, tmp_path):
    def planned(flag):
        return plan(TrainConfig, given_settings(TrainConfig, [*tiny, flag]), restarted=False)

    assert planned("--init_from=auto").init_from == "scratch"
    with pytest.raises(FolioError, match="no run to resume"):
        planned("--init_from=resume")
    with pytest.raises(FolioError, match="no model here"):
        planned(f"--init_from={tmp_path}")
    with pytest.raises(FolioError, match=r"resum: there is no such folder.*did you mean resume\?"):
        planned("--init_from=resum")


def test_copies_of_the_weights_can_be_kept_to_compare_stages(tiny, tmp_path, run_in_process):
    run_in_process(*tiny, "--keep_every=3")
    folders = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert folders == ["step_000003", "step_000006"]
    early, late = (load_model(tmp_path / "run" / name) for name in folders)
    assert not torch.equal(early.transformer.wte.weight, late.transformer.wte.weight)


def test_nanogpts_bin_files_train_as_they_are(gpt2, tmp_path, run_in_process, monkeypatch):
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda: gpt2)
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    ids = gpt2.encode("All the world's a stage, and all the men and women merely players.\n" * 40)
    for name in ("train.bin", "val.bin"):  # as nanoGPT writes them: no tokenizer, no meta
        ids.astype(np.uint16).tofile(folder / name)
    flags = [
        f"--dataset={folder}", f"--out_dir={tmp_path / 'run'}", "--n_layer=1", "--n_head=1",
        "--n_embd=8", "--max_iters=1", "--block_size=8", "--sample_tokens=3", "--device=cpu",
    ]  # fmt: skip
    told = run_in_process(*flags, "--tokenizer=gpt2")
    assert "a vocabulary of 50,257" in told


# --- What each part of an update does ---


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_group_follows_the_schedule_from_its_own_peak(tiny, optimizer):
    run = training_for(*tiny, f"--optimizer={optimizer}", "--learning_rate=4e-3")
    batches = train.training_batches(run)
    for run.step in range(8):
        done = train.update(run, batches)
        share = learning_rate_share(run.step, run.config)
        assert done.learning_rate == share * 4e-3
        for group in run.optimizer.param_groups:
            peak = 0.02 if "momentum" in group else 4e-3
            assert group["lr"] == pytest.approx(share * peak)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_gradient_is_clipped_to_its_greatest_norm(tiny, monkeypatch, dtype):
    run = training_for(*tiny, "--grad_clip=0.01", f"--dtype={dtype}", "--optimizer=adamw")
    norms, step = [], run.optimizer.step

    def looking(*args, **how):
        squares = [p.grad.square().sum() for p in run.model.parameters()]
        norms.append(torch.stack(squares).sum().sqrt().item())
        return step(*args, **how)

    monkeypatch.setattr(run.optimizer, "step", looking)
    done = train.update(run, train.training_batches(run))
    assert done.grad_norm > 0.1  # told as it was, unscaled and before clipping
    assert done.grad_norm < 100
    assert norms == [pytest.approx(0.01, rel=1e-2)]


def test_float16_gives_up_where_no_scale_is_small_enough(tiny):
    run = training_for(*tiny, "--dtype=float16")
    run.model.transformer.ln_f.weight.register_hook(lambda grad: grad * math.inf)
    batches = itertools.cycle([next(train.training_batches(run))])
    with pytest.raises(FolioError, match="gradient's norm"):
        for run.step in range(60):
            train.update(run, batches)
    assert 10 < run.step < 60  # it tried smaller scales first


def test_the_record_of_a_checkpoint_is_written_last(tiny, monkeypatch, call):
    written = []
    for name in ("save_model", "save_resume"):
        real = getattr(train, name)
        monkeypatch.setattr(
            train, name, lambda *args, _n=name, _r=real: (written.append(_n), _r(*args))
        )
    real_log = train.Report.log
    monkeypatch.setattr(
        train.Report, "log", lambda self, *args: (written.append("log"), real_log(self, *args))
    )
    assert call(train, *tiny, "--max_iters=0").returncode == 0
    assert written == ["save_model", "log", "save_resume"]


def test_a_run_tells_transformers_where_texts_end_and_how_long_they_may_be(tiny, tmp_path, call):
    write_dataset(
        tmp_path / "bpe", toy_bpe(), {"train": ["low " * 99], "val": ["low " * 99]}, {"source": "a"}
    )
    assert call(train, *tiny, f"--dataset={tmp_path / 'bpe'}", "--max_iters=0").returncode == 0
    for name in ("config.json", "generation_config.json"):
        contents = json.loads((tmp_path / "run" / name).read_text())
        assert contents["eos_token_id"] == contents["bos_token_id"] == 261
    assert contents["max_length"] == 8


def test_the_last_step_is_logged_once(tiny, tmp_path, run_in_process):
    run_in_process(*tiny, "--max_iters=10")  # a multiple of log_interval, not of eval_interval
    steps = [int(row["step"]) for row in log_of(tmp_path / "run")]
    assert steps == [0, 2, 4, 6, 8, 10]


def test_a_run_that_was_stopped_is_evaluated_when_it_ends_there(tiny, tmp_path, run_in_process):
    stop_after(4, [*tiny, "--eval_interval=100"])
    before = log_of(tmp_path / "run")
    run_in_process(*tiny, "--init_from=resume", "--max_iters=4")
    *first, last = log_of(tmp_path / "run")
    assert [row["step"] for row in (*first, last)] == [row["step"] for row in before]
    assert float(last.pop("val_loss")) > 0 and float(last.pop("bits_per_byte")) > 0
    assert last.items() <= before[-1].items()  # training has not gone on


def test_resuming_refuses_another_text_under_the_same_name(tiny, tmp_path, run_in_process, call):
    for text in ("to be or not to be\n", "not to be or to be\n"):
        splits = {"train": [text * 9], "val": [text]}
        write_dataset(tmp_path / "mine", CharTokenizer.of(text), splits, {"source": "a test"})
        flags = [*tiny, f"--dataset={tmp_path / 'mine'}"]
        if text.startswith("to"):
            run_in_process(*flags)
    assert_one_line_error(call(train, *flags, "--init_from=resume"), "not the text with which")


def test_resuming_refuses_a_dataset_that_has_grown(tiny, rhyme, run_in_process, call):
    """Windows are counted through all shards: with one shard more, all of them are others."""
    run_in_process(*tiny, "--max_iters=4")
    shutil.copy(rhyme / "train.bin", rhyme / "train_more.bin")
    assert_one_line_error(call(train, *tiny, "--init_from=resume"), "not the text with which")


def test_an_evaluation_that_overflows_is_not_the_best_and_spoils_nothing(
    tiny, tmp_path, call, monkeypatch
):
    losses = iter([4.0, math.nan, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda run: (next(losses), 1.0))
    assert call(train, *tiny).returncode == 0
    assert load_resume(tmp_path / "run")["best_val_loss"] == 3.0
    assert_same_state(
        load_resume(tmp_path / "run")["model"], load_model(tmp_path / "run").state_dict()
    )


def test_a_run_that_was_moved_goes_on_where_it_is_now(tiny, tmp_path, run_in_process):
    run_in_process(*tiny, "--max_iters=4")
    (tmp_path / "run").rename(tmp_path / "moved")
    run_in_process(*tiny, "--init_from=resume", f"--out_dir={tmp_path / 'moved'}")
    assert load_resume(tmp_path / "moved")["step"] == 8
    assert not (tmp_path / "run").exists()


def test_the_best_of_some_windows_is_not_compared_with_others(tiny, tmp_path, run_in_process):
    run_in_process(*tiny, "--max_iters=4")
    state = load_resume(tmp_path / "run")
    save_resume(tmp_path / "run", {**state, "best_val_loss": 0.01})
    run_in_process(*tiny, "--init_from=resume", "--max_iters=8", "--eval_tokens=128")
    assert load_resume(tmp_path / "run")["best_val_loss"] > 1


def test_resuming_may_change_the_precision(tiny, run_in_process):
    run_in_process(*tiny, "--max_iters=2")
    told = run_in_process(*tiny, "--max_iters=4", "--init_from=resume", "--dtype=float16")
    assert "resuming with dtype = float16" in told
