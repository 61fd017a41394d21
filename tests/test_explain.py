"""The page that explain.py writes, opened in a real browser.

The tests need Chromium from the system's packages (Debian: apt install chromium) and the package
playwright. Without them, they are skipped and say so; the tests of the Python side always run.
"""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import explain
from configurator import FolioError
from data.prepare import split_text, write_dataset
from data.tokenizer import BPETokenizer, CharTokenizer, save_tokenizer
from engine.checkpoint import load_model, save_model
from engine.inference import sampling_probs
from engine.log_file import COLUMNS, write_log
from model import GPT, GPTConfig, attention_weights
from tests import hub_server
from tests.conftest import assert_one_line_error

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\n"
TEXT = "ROMEO: but soft,\nwhat light!\té🙂 " + HOSTILE + "</script>&amp;"


def make_model_folder(
    folder: Path, text: str = TEXT, tokenizer=None, step: int | None = None, **sizes: int
) -> Path:
    """A model with random weights that are large enough for attention to differ."""
    tokenizer = tokenizer or CharTokenizer.from_text(text)
    numbers = {} if step is None else {"step": step}
    sizes = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32} | sizes
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(model, folder, **numbers)
    save_tokenizer(tokenizer, folder)
    return folder


def page_data(page: Path) -> dict:
    html = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.S)[1])


def decode(encoded: dict) -> np.ndarray:
    if "float32" in encoded:
        return np.frombuffer(base64.b64decode(encoded["float32"]), "<f4")
    return np.frombuffer(base64.b64decode(encoded["int16"]), "<i2") * encoded["scale"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of 300 steps with a snapshot every 100; the best weights are those of step 200."""
    torch.manual_seed(0)
    folder = make_model_folder(tmp_path_factory.mktemp("page") / "run", step=200)
    shutil.copytree(folder, folder / "step_000200")
    for step in (100, 300):
        make_model_folder(folder / f"step_{step:06}", step=step)
    settings = {"dataset": "none", "max_iters": 300, "n_layer": 2, "init_from": "scratch"}
    (folder / "settings.json").write_text(json.dumps(settings))
    row = dict.fromkeys(COLUMNS) | {"tokens": 0, "seconds": 0.0}
    rows = [
        row | {"step": step, "val_loss": loss}
        for step, loss in ((100, 2.5), (200, 2.0), (300, None))
    ]
    write_log(folder / "log.csv", rows)
    return folder


# --- Without a browser ---


def test_the_numbers_of_the_page_are_those_of_the_model(tmp_path, call):
    folder = make_model_folder(tmp_path / "model")
    output = tmp_path / "page.html"
    result = call(explain, f"--init_from={folder}", f"--start={TEXT[:20]}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert str(output) in result.stdout and output.as_uri() in result.stdout
    data, model = page_data(output), load_model(folder)
    (snapshot,) = data["snapshots"]
    idx = torch.tensor([data["ids"]])
    loss = model(idx[:, :-1], idx[:, 1:]).item()
    assert np.mean(snapshot["losses"]) == pytest.approx(loss, rel=1e-5)
    block = model.transformer.h[0]
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(20))
    q, k, v = block.attn.qkv(block.ln_1(x))
    scores = decode(snapshot["scores"]).reshape(2, 2, -1)[0]  # (n_head, 20 * 21 / 2)
    lower = torch.ones(20, 20, dtype=torch.bool).tril()
    np.testing.assert_allclose(scores, (q @ k.mT)[0][:, lower].detach(), atol=2e-3)
    messages = decode(snapshot["messages"]).reshape(2, 2, 20, 16)[0]
    np.testing.assert_allclose(messages, (attention_weights(q, k) @ v)[0].detach(), atol=2e-3)
    last = snapshot["layers"][-1]  # after the last block: what the model predicts
    probs = model(idx)[0].softmax(-1)
    # Six digits: the page rounds them to three, and must not round a rounded number.
    assert last["actual"][:-1] == pytest.approx(probs[range(19), idx[0, 1:]].tolist(), rel=1e-5)
    assert last["actual"][-1] is None
    np.testing.assert_allclose(last["probs"], probs.topk(3).values.detach(), rtol=1e-5)
    assert last["mean_loss"] == pytest.approx(loss, rel=1e-5)
    probs = model.lm_head(model.transformer.ln_f(x))[0].softmax(-1)[range(19), idx[0, 1:]]
    embedding = snapshot["layers"][0]
    assert embedding["mean_loss"] == pytest.approx(-probs.log().mean().item(), rel=1e-5)
    assert data["token"] == "one character"


def test_a_model_whose_logits_overflow_is_refused():
    """JSON has no NaN: the page would be empty."""
    model = GPT(GPTConfig(8, 5, 1, 1, 8)).eval()
    model.transformer.ln_f.weight.data.fill_(1e38)
    model.transformer.wte.weight.data.mul_(1e10)
    with pytest.raises(FolioError, match="logits of this model are not finite"):
        explain.explain(model, torch.arange(4))


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the\n", "␣the↵"), ("é🙂".encode(), "é🙂"), (b"\xe2\x80", "<E2><80>"),
        (b"\t\r", "⇥<CR>"), (b" \xf0\x9f", "␣<F0><9F>"), ("é".encode() + b"\xe2", "é<E2>"),
        (b"a\x00", "a<U+0000>"), ("\u202e".encode(), "<U+202E>"), (b"", ""),
        ("\u0301".encode(), "◌\u0301"), ("e\u0301".encode(), "e\u0301"),
        ("\u2764\ufe0f".encode(), "\u2764<U+FE0F>"),
    ],
)  # fmt: skip
def test_special_characters_are_shown_clearly(token, shown):
    assert explain.visible(token) == shown


def test_no_token_can_end_the_data_element(tmp_path):
    data = {"title": HOSTILE, "vocab": {"0": "</script>", "1": "<!--<script>", "2": "\\u003c"}}
    explain.write_page(data, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("</script>") == 2  # of the data, and of the program
    assert html.count("<script") == 2 and "<!--" not in html
    assert page_data(tmp_path / "page.html") == data


def test_without_start_the_page_shows_the_validation_text(tmp_path, call, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    text = "abcdefghij" * 30 + "jihgfedcba" * 6
    folder = make_model_folder(tmp_path / "run", text)
    splits = split_text(text, 0.2)
    write_dataset(tmp_path / "letters", CharTokenizer.from_text(text), splits, {"source": "test"})
    settings = {"max_iters": 1, "n_layer": 2, "init_from": "scratch", "dataset": "~/letters"}
    (folder / "settings.json").write_text(json.dumps(settings))
    for missing in ("explain.html", "tokenizer.json"):  # then: a folder as nanoGPT makes it
        (tmp_path / "letters" / missing).unlink(missing_ok=True)
        result = call(explain, f"--out_dir={folder}", "--max_tokens=30")
        assert result.returncode == 0, result.stderr
        data = page_data(folder / "explain.html")
        shown = "".join(data["vocab"][str(i)] for i in data["ids"])
        assert shown == splits["val"][0][:30]
    write_dataset(tmp_path / "letters", CharTokenizer("klmnopqrst"), split_text("klm" * 99), {})
    result = call(explain, f"--out_dir={folder}", "--max_tokens=30")
    assert_one_line_error(
        result, "give a text with --start", "has been prepared again since the run"
    )


def test_texts_that_cannot_be_shown_are_refused_or_cut(tmp_path, call):
    source = f"--init_from={make_model_folder(tmp_path / 'model')}"
    output = f"--output={tmp_path / 'page.html'}"
    result = call(explain, source, output, "--start=" + "ROMEO: " * 200, "--max_tokens=40")
    assert result.returncode == 0 and "first 40 of 1,400 tokens" in result.stdout
    for flags, words in (
        (["--start=x", "--max_tokens=1024"], "at most 256"),
        (["--start=R"], "at least 2 tokens"),
        (["--start=Ω and others"], "prompt: the character 'Ω'"),
        ([], "give a text with --start"),
    ):
        assert_one_line_error(call(explain, source, output, *flags), words)


def test_a_page_of_128_tokens_has_at_most_2_megabytes(tmp_path, call):
    text = "".join(map(chr, range(32, 97))) * 2
    sizes = {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128}
    folder, output = make_model_folder(tmp_path / "model", text, **sizes), tmp_path / "page.html"
    for step in range(1, 6):  # a training run with five snapshots: not all of them fit into it
        make_model_folder(folder / f"step_{step}", text, step=step, **sizes)
    flags = [f"--output={output}", "--max_tokens=128", f"--start={text[:128]}"]
    assert call(explain, f"--init_from={folder}", *flags).returncode == 0
    assert len(page_data(output)["ids"]) == 128
    assert len(page_data(output)["snapshots"]) > 1
    assert output.stat().st_size <= 2e6


def test_a_page_of_gpt2_from_the_hub_has_at_most_5_megabytes(gpt2, tmp_path, call, monkeypatch):
    """GPT-2's layers and heads; a quarter of its channels, and its first 2,048 tokens.

    The page shows 16 channels of a value and 1,000 tokens of a vocabulary, so the size of the file
    does not depend on the other ones.
    """
    ranks = {token: i for token, i in gpt2.mergeable_ranks.items() if i < 2048}
    tokenizer, sizes = BPETokenizer(ranks, 2048), {"n_layer": 12, "n_head": 12, "n_embd": 768 // 4}
    folder = make_model_folder(tmp_path / "gpt2", tokenizer=tokenizer, **sizes)
    output, text = tmp_path / "page.html", "The quick brown 🦊 jumps over 3 naïve dogs.\n" * 9
    with hub_server.HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.add_folder("openai-community/gpt2", folder)
        result = call(explain, "--init_from=gpt2", f"--start={text}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert "first 64 of" in result.stdout and "computing gpt2" in result.stdout
    data = page_data(output)
    assert (data["title"], data["n_layer"], data["n_head"]) == ("gpt2", 12, 12)
    assert data["token"] == "a piece of text"
    shown = [data["vocab"][str(i)] for i in data["ids"]]
    assert "".join(shown).startswith("The␣quick␣brown␣<F0><9F><A6><8A>␣jumps")
    assert {"The", "␣qu"} <= set(shown)  # tokens of several characters
    assert len(data["ids"]) == 64
    assert 2e6 < output.stat().st_size <= 5e6


def test_snapshots_are_shown_in_the_order_of_steps_and_the_best_weights_once(run_folder):
    snapshots = explain.choose_folders(run_folder, max_snapshots=7)
    assert [path.name for path in snapshots] == ["step_000100", "run", "step_000300"]
    assert [*map(explain.weights_label, snapshots)] == [
        "step 100 of 300, validation loss 2.5000",
        "step 200 of 300, validation loss 2.0000 (best weights)",
        "step 300 of 300, not evaluated",
    ]


def test_the_loss_of_a_label_is_that_of_the_weights_not_of_a_repeated_step(run_folder, tmp_path):
    """If a run is killed after saving weights and is resumed, log.csv has its step again."""
    shutil.copytree(run_folder, tmp_path / "run")
    model = load_model(run_folder)
    save_model(model, tmp_path / "run", step=200, val_loss=1.5)  # log.csv: 2.0
    label = explain.weights_label(tmp_path / "run")
    assert label == "step 200 of 300, validation loss 1.5000 (best weights)"


def test_snapshots_of_an_abandoned_part_of_training_are_not_shown(run_folder, tmp_path):
    """Training was killed after step 300 and went on from step 200, with other settings."""
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "step_000300").rename(folder / "step_000300.1")
    names = [path.name for path in explain.choose_folders(folder, max_snapshots=7)]
    assert names == ["step_000100", "run"]


def test_the_page_of_one_snapshot_names_its_step_and_loss(run_folder, tmp_path, call):
    output = tmp_path / "page.html"
    flags = [f"--out_dir={run_folder / 'step_000100'}", f"--start={TEXT[:9]}"]
    assert call(explain, *flags, f"--output={output}").returncode == 0
    labels = [snapshot["label"] for snapshot in page_data(output)["snapshots"]]
    assert labels == ["step 100 of 300, validation loss 2.5000"]


def test_a_run_may_be_called_like_a_snapshot(run_folder, tmp_path, call):
    folder, output = shutil.copytree(run_folder, tmp_path / "step_decay"), tmp_path / "page.html"
    flags = [f"--out_dir={folder}", f"--start={TEXT[:9]}", f"--output={output}"]
    assert call(explain, *flags).returncode == 0
    labels = [snapshot["label"] for snapshot in page_data(output)["snapshots"]]
    assert all(" of 300" in label for label in labels), labels


def test_of_many_snapshots_the_first_the_last_and_some_between_are_shown(tmp_path, monkeypatch):
    for step in range(1, 14):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / "model.safetensors").touch()
    steps = {path: int(path.name[5:]) for path in tmp_path.glob("step_*")} | {tmp_path: 8}
    monkeypatch.setattr(explain, "saved_step", steps.get)
    for number, chosen in ((4, [1, 5, 8, 9, 13]), (12, list(range(1, 14)))):
        folders = explain.choose_folders(tmp_path, number)
        assert [steps[folder] for folder in folders] == chosen


def test_printed_lines_name_the_run_once_and_fit_80_columns(run_folder, call):
    """The path of the file can be longer; it stands alone on the last line."""
    result = call(explain, f"--out_dir={run_folder}", f"--start={TEXT * 9}", "--max_tokens=9")
    *lines, last = result.stdout.splitlines()
    assert last.strip() == (run_folder / "explain.html").as_uri()
    lines = [line.replace(str(run_folder), "out/shakespeare_char") for line in lines]
    assert lines[0] == "the page of out/shakespeare_char"
    assert lines[2] == "computing step 100 of 300, validation loss 2.5000"
    assert len(lines) == 6 and max(map(len, lines)) <= 80, lines


# --- In the browser ---


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no Chromium on this machine: the page was not tested in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        args = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-background-networking",
        ]
        browser = p.chromium.launch(executable_path=executable, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(run_folder):
    return write_page(run_folder)


def write_page(folder: Path, text: str = TEXT[:50]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        output = folder / "page.html"
        flags = [f"--init_from={folder}", f"--start={text}", f"--output={output}"]
        patch.setattr("sys.argv", ["explain.py", *flags])
        explain.main()
    return output


@pytest.fixture
def open_page(browser):
    """Open a page; at the end, it must have sent no request and logged no error.

    A narrow page is a phone's: it has a touch screen.
    """
    contexts, requests, messages = [], [], []

    def open_page(path: Path, width: int = 1280, height: int = 720, theme: str = "light"):
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=theme,
                has_touch=width < 800,
            )
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)
    assert messages == []


def residual_streams(folder: Path, ids: list[int]) -> list[torch.Tensor]:
    """After the embedding and after each block, (1, T, C) each."""
    transformer = load_model(folder).transformer
    streams = [transformer.wte(torch.tensor([ids])) + transformer.wpe(torch.arange(len(ids)))]
    for block in transformer.h:
        streams.append(block(streams[-1]).detach())
    return streams


def attention(folder: Path, ids: list[int]) -> list[torch.Tensor]:
    """The weights of each layer, (n_head, T, T) each."""
    blocks = load_model(folder).transformer.h
    pairs = zip(blocks, residual_streams(folder, ids), strict=False)
    tables = [attention_weights(*block.attn.qkv(block.ln_1(x))[:2])[0] for block, x in pairs]
    return [table.detach() for table in tables]


def test_attention_in_the_page_equals_attention_weights(open_page, page_file, run_folder):
    page, data = open_page(page_file), page_data(page_file)
    for layer, expected in enumerate(attention(run_folder, data["ids"])):
        for head in range(data["n_head"]):
            for t in (0, 7, 31):
                row = page.evaluate(f"attentionWeights({layer}, {head}, {t})")
                assert row == pytest.approx(expected[head, t, : t + 1].tolist(), abs=1e-3)


@pytest.mark.parametrize("vocab_size", [50, 2100])
def test_sliders_reshape_probabilities_as_sampling_does(open_page, tmp_path, vocab_size):
    """Of 2,100 tokens, the page has 1,000 one by one, and the sum of all others."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + vocab_size)))
    folder = make_model_folder(tmp_path / "model", text)
    file = write_page(folder, text[:12])
    page, data = open_page(file), page_data(file)
    logits, beyond = load_model(folder)(torch.tensor([data["ids"]]))[0], 0
    for temperature, top_k, top_p in (
        (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (0.8, 5, 0.9), (0.1, 0, 0.5),
        (1.0, 1, 1.0), (1.0, 0, 0.3), (1.0, 0, 0.95), (2.0, 0, 0.9),
    ):  # fmt: skip
        probs = sampling_probs(logits, temperature, top_k, top_p)
        for t in (0, 9):
            shown = page.evaluate(f"samplingProbs({t}, {temperature}, {top_k}, {top_p})")
            ids = data["snapshots"][0]["logit_ids"][t]
            assert len(shown) == len(ids) == min(1000, vocab_size)
            # The error is below 1 / 1000 where top-p also keeps some of the tokens of the sum.
            beyond += top_p < 1 and int((probs[t] > 0).sum()) > len(ids)
            assert shown == pytest.approx(probs[t, ids].tolist(), rel=1e-3)
    assert (beyond > 0) == (vocab_size > 1000)
    page.evaluate("now().logits.fill(0)")  # all tokens are equally likely
    shown = page.evaluate("samplingProbs(0, 1, 3, 1)")
    assert shown == pytest.approx([1 / 3] * 3 + [0] * (len(shown) - 3))


def test_clicks_and_keys_change_what_they_should(open_page, page_file):
    page = open_page(page_file)
    page.click('.token[data-position="5"]')
    assert page.locator("h2 .selected-token").all_inner_texts() == [":\xa0(5)"] * 3
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.position") == 6
    assert page.inner_text("h2 .selected-token >> nth=0") == "␣\xa0(6)"
    assert page.get_attribute(".token.selected", "data-position") == "6"
    assert page.evaluate("document.activeElement.dataset.position") == "6"
    page.keyboard.press("l")
    page.keyboard.press("h")
    assert "layer 2 of 2, head 2 of 2" in page.inner_text(".current-head >> nth=0")
    page.keyboard.press("H")
    page.keyboard.press("L")
    assert "layer 1 of 2, head 1 of 2" in page.inner_text(".current-head >> nth=0")
    page.click('#heads button[data-layer="0"][data-head="1"]')
    assert "layer 1 of 2, head 2 of 2" in page.inner_text(".current-head >> nth=0")
    button = page.locator('#heads button[data-layer="0"][data-head="1"]')
    assert button.get_attribute("aria-pressed") == "true"
    page.click('#graph text[data-position="2"]')
    assert page.evaluate("state.position") == 2
    page.click("#table", position={"x": 5, "y": 300})
    assert page.evaluate("state.position") == int(300 / (420 // 50))


def test_in_a_slider_arrows_move_the_slider_and_letters_still_work(open_page, page_file):
    page = open_page(page_file)
    for slider in ("temperature", "top-k", "top-p", "snapshot"):
        page.focus(f"#{slider}")
        before, position = page.input_value(f"#{slider}"), page.evaluate("state.position")
        page.keyboard.press("ArrowLeft")
        assert float(page.input_value(f"#{slider}")) < float(before)
        assert page.evaluate("state.position") == position
    page.keyboard.press("l")
    assert page.evaluate("state.layer") == 1
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("state.position") == position - 1


def test_heads_are_numbered_from_1_above_their_tables(open_page, page_file):
    page = open_page(page_file)
    centers = "nodes => nodes.map(n => n.getBoundingClientRect()).map(b => b.left + b.width / 2)"
    assert page.locator("#heads .number").all_inner_texts() == ["1", "2"]
    assert page.locator("#heads .head-row > span:first-child").all_inner_texts() == [
        "head", "layer 1", "layer 2",
    ]  # fmt: skip
    numbers = page.eval_on_selector_all("#heads .number", centers)
    tables = page.eval_on_selector_all('#heads button[data-layer="1"]', centers)
    assert numbers == pytest.approx(tables, abs=1)


def test_the_table_of_weights_is_labeled_and_names_the_cell_under_the_mouse(
    open_page, page_file, run_folder
):
    page, data = open_page(page_file), page_data(page_file)
    assert "weight 0" in page.inner_text("#scale") and "100%" in page.inner_text("#scale")
    assert "token that sends" in page.inner_text(".axis-x")
    assert "token that receives" in page.inner_text(".axis-y")
    names = [data["vocab"][str(i)] for i in data["ids"]]
    size = 420 // len(names)  # pixels of a cell
    weight = attention(run_folder, data["ids"])[0][0, 40, 3].item()
    page.hover("#table", position={"x": 3.5 * size, "y": 40.5 * size})
    assert re.fullmatch(
        rf"{names[40]}\s\(40\) attends to {names[3]}\s\(3\) with the weight (.*)%",
        page.inner_text("#cell"),
    )
    shown = float(page.inner_text("#cell").split()[-1].strip("<%"))
    assert shown == pytest.approx(100 * weight, abs=0.1)
    assert page.locator(".token.hovered").get_attribute("data-position") == "3"
    cell, table = (page.locator(s).bounding_box() for s in ("#cell-box", "#table"))
    assert cell["x"] - table["x"] == pytest.approx(3 * size, abs=1)
    assert cell["y"] - table["y"] == pytest.approx(40 * size, abs=1)
    page.hover("#table", position={"x": 40.5 * size, "y": 3.5 * size})
    assert "cannot attend" in page.inner_text("#cell")
    page.hover('.token[data-position="7"]')
    page.evaluate("select({ position: 9 })")
    assert re.match(r"..\(9\) attends to .*\(7\)", page.inner_text("#cell"))
    pixels = page.evaluate("""() => {
        const image = $("table").getContext("2d").getImageData(0, 0, T, T).data;
        return [[40, 3], [3, 40]].map(([t, s]) => [...image.slice(4 * (t * T + s)).slice(0, 4)]);
    }""")
    blue = [8, 81, 156]  # on white; the square root makes small weights visible
    expected = [round(255 + (c - 255) * weight**0.5) for c in blue]
    assert pixels[0] == pytest.approx([*expected, 255], abs=2)
    assert pixels[1][3] == 0  # the future: nothing is drawn


def test_the_arcs_of_the_graph_are_as_wide_as_the_weights(open_page, page_file, run_folder):
    page, data = open_page(page_file), page_data(page_file)
    page.evaluate("select({ position: 30, layer: 1, head: 1 })")
    weights = attention(run_folder, data["ids"])[1][1, 30, :31].tolist()
    widths = page.eval_on_selector_all(
        "#graph path",
        "arcs => arcs.map(a => [+a.dataset.position, +a.getAttribute('stroke-width')])",
    )
    assert [s for s, _ in widths] == [s for s, w in enumerate(weights) if w >= 0.002]
    assert [w for _, w in widths] == pytest.approx(
        [max(0.5, 12 * weights[s]) for s, _ in widths], abs=0.02
    )
    largest = max(range(31), key=weights.__getitem__)
    assert page.inner_text("#largest").split("(")[1].startswith(f"{largest})")
    page.hover(f'.token[data-position="{largest}"]')
    opaque = page.locator('#graph path[stroke-opacity="1"]')
    assert opaque.get_attribute("data-position") == str(largest)


def test_the_numbers_of_a_message_equal_the_models(open_page, page_file, run_folder):
    page, data = open_page(page_file), page_data(page_file)
    page.evaluate("select({ position: 30, layer: 1, head: 0 })")
    assert page.locator("#message tr").count() == 10  # a header, eight tokens, the sum
    page.click("#more")
    assert page.locator("#message tr").count() == 33
    model, (x, _) = load_model(run_folder), residual_streams(run_folder, data["ids"])[1:]
    block = model.transformer.h[1]
    q, k, v = (part[0, 0].detach() for part in block.attn.qkv(block.ln_1(x)))
    scores = k[:31] @ q[30]
    weights = (scores / 16**0.5).softmax(0)  # head_dim is 32 / 2 = 16
    for row in page.locator("#message tr[data-position]").all()[:5]:
        token, *numbers, _ = row.locator("td").all_inner_texts()
        s = int(numbers[0])
        assert token == data["vocab"][str(data["ids"][s])]
        shown = [float(number.strip("%")) for number in numbers[1:]]
        assert shown[0] == pytest.approx(scores[s].item(), abs=0.02)
        assert shown[1] == pytest.approx(scores[s].item() / 4, abs=0.01)
        assert shown[2] == pytest.approx(100 * weights[s].item(), abs=0.1)
    assert "of all 31 tokens" in page.inner_text("#message tr.summary")
    message = page.get_attribute("#message tr.summary .cells", "title")
    expected = (weights[:, None] * v[:31]).sum(0).tolist()
    assert [float(x) for x in message.split(", ")] == pytest.approx(expected, abs=0.02)


def test_the_prediction_table_marks_the_actual_next_token(open_page, page_file, run_folder):
    page, data = open_page(page_file), page_data(page_file)
    page.click('.token[data-position="9"]')
    row, actual = page.locator("#prediction tr.actual"), data["ids"][10]
    assert data["vocab"][str(actual)] in row.inner_text()
    logits = load_model(run_folder)(torch.tensor([data["ids"]]))[0, 9]
    rank = int((logits > logits[actual]).sum()) + 1
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(actual)).item()
    assert f"rank {rank}, " in page.inner_text("#actual")
    p = logits.softmax(-1)[actual].item()
    percent = f"{100 * p:.{1 if p >= 0.1 else 2}f}%"
    words = f"probability {percent}, loss {loss:.2f} (before temperature, top-k, top-p)."
    assert words in page.inner_text("#actual")
    assert percent in page.inner_text("#layers tr:last-child")
    probabilities = page.locator("#prediction .number")
    unchanged, sentence = probabilities.all_inner_texts(), page.inner_text("#actual")
    assert page.is_disabled("#reset")
    page.evaluate('document.getElementById("top-k").value = 2')
    page.dispatch_event("#top-k", "input")
    page.evaluate('document.getElementById("temperature").value = 4')  # 0.5
    page.dispatch_event("#temperature", "input")
    first = page.locator("#prediction tr").first
    expected = sampling_probs(logits[None], temperature=0.5, top_k=2).max().item()
    assert float(first.get_attribute("data-probability")) == pytest.approx(expected, abs=1e-4)
    assert page.inner_text("#top-k-value") == "2"
    assert page.inner_text("#actual") == sentence
    assert probabilities.all_inner_texts()[2:10] == ["0"] * 8
    assert page.locator("#prediction .bar").count() == 2  # a probability of 0 has no bar
    page.click("#reset")
    assert probabilities.all_inner_texts() == unchanged
    assert page.inner_text("#top-k-value") == "all"
    assert page.input_value("#temperature") == "9"  # of 0.1, 0.2, ...: 1.0
    bar = page.locator("#prediction .bar-cell").first.bounding_box()
    page.click(f'.token[data-position="{len(data["ids"]) - 1}"]')
    assert "The text ends here" in page.inner_text("#actual")
    assert page.locator("#layers .bar").count() == 0
    assert page.locator("#prediction .bar-cell").first.bounding_box() == bar


def test_the_page_says_from_which_layer_on_the_final_prediction_is_the_likeliest(
    open_page, page_file, run_folder
):
    page, data = open_page(page_file), page_data(page_file)
    model = load_model(run_folder)
    streams = residual_streams(run_folder, data["ids"])
    probs = [model.lm_head(model.transformer.ln_f(x))[0].softmax(-1) for x in streams]
    first = [p.argmax(-1) for p in probs]
    seen = set()
    for t in range(0, len(data["ids"]), 3):
        page.evaluate(f"select({{ position: {t} }})")
        changes = [i for i in (1, 2) if first[i][t] != first[i - 1][t]]
        since = max(changes, default=0)
        shown = [f"{100 * probs[i][t].max().item():.1f}%" for i in (since, 2)]
        words = f"after {'the embedding' if since == 0 else f'layer {since}'} ({shown[0]})"
        assert f"is the likeliest token {words}" in page.inner_text("#sure")
        assert since == 2 or f"at the end it has {shown[1]}." in page.inner_text("#sure")
        is_actual = first[2][t] == data["ids"][t + 1]
        words = "It is the actual" if is_actual else "It is not the actual"
        assert words in page.inner_text("#sure")
        seen.add(since)
    assert {1, 2} <= seen
    rows = page.locator("#layers tr td:first-child").all_inner_texts()
    assert rows == ["embedding", "layer 1", "layer 2"]


def test_the_training_slider_shows_earlier_weights_and_their_loss(open_page, page_file):
    page = open_page(page_file)
    assert page.inner_text("#snapshot-label").endswith("validation loss 2.0000 (best weights)")
    best = page.evaluate("attentionWeights(0, 0, 9)")
    page.focus("#snapshot")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#training output") == "step 100 of 300, validation loss 2.5000"
    early = page.evaluate("attentionWeights(0, 0, 9)")
    assert max(abs(a - b) for a, b in zip(early, best, strict=True)) > 0.01
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.locator("#training").bounding_box()["y"] == 0  # still in view


def test_tokens_with_html_do_nothing(open_page, page_file, tmp_path):
    data = page_data(page_file)
    data["title"] = HOSTILE
    data["vocab"] = {id_: f"{HOSTILE}{token}" for id_, token in data["vocab"].items()}
    for snapshot in data["snapshots"]:
        snapshot["label"] = HOSTILE
    explain.write_page(data, tmp_path / "page.html")
    page = open_page(tmp_path / "page.html")
    page.keyboard.press("ArrowRight")
    page.hover('.token[data-position="1"]')
    page.hover("#table")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, body script").count() == 2  # the data and the program
    assert "<script>window.hacked" in page.inner_text("#text")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_the_screen_and_is_readable(open_page, page_file, theme, width, height):
    page = open_page(page_file, width, height, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Only the graph may be scrolled sideways: a token is a node of it, however many there are.
    too_wide = """[...document.querySelectorAll("main *")].filter((node) =>
        !node.closest("#graph") && (node.getBoundingClientRect().right > innerWidth ||
        getComputedStyle(node).overflowX === "auto" && node.scrollWidth > node.clientWidth + 1)
        ).map((node) => node.id || node.className || node.tagName)"""
    page.evaluate("select({ position: 40, all: true })")
    assert page.evaluate(too_wide) == []
    # Contrast of 4.5 (WCAG AA) for every token and for the notes.
    contrasts = page.evaluate("""() => {
        const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const pairs = [...document.querySelectorAll('.token')].map((node) => {
            const style = getComputedStyle(node);
            return [style.color, style.backgroundColor];
        });
        const card = getComputedStyle(document.querySelector('section')).backgroundColor;
        for (const node of document.querySelectorAll('.note, th, tr.actual td, h2'))
            pairs.push([getComputedStyle(node).color, card]);
        return pairs.map(([a, b]) => contrast(luminance(rgb(a)), luminance(rgb(b))));
    }""")
    assert len(contrasts) > 50 and min(contrasts) >= 4.5
    if width < 800:  # a phone is turned, and a finger reads a weight of the table
        page.set_viewport_size({"width": width - 60, "height": height})
        centers = """new Promise((done) => requestAnimationFrame(() => setTimeout(() =>
            done([$("graph").querySelector(".chosen"), $("graph")].map((node) =>
                node.getBoundingClientRect()).map((box) => (box.left + box.right) / 2)))))"""
        token, graph = page.evaluate(centers)
        assert token == pytest.approx(graph, abs=2)
        page.tap("#table", position={"x": 20, "y": 200})
        assert "attends to" in page.inner_text("#cell")
