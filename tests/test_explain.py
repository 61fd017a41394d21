"""The page that explain.py writes, opened in a real browser.

The tests need Chromium from the system's packages (Debian: apt install chromium) and the package
playwright. Without them, they are skipped and say so; the tests of the Python side always run.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import explain
from data.prepare import split_text, write_dataset
from data.tokenizer import CharTokenizer
from engine.checkpoint import load_model, save_model, save_tokenizer
from engine.inference import sampling_probs
from model import GPT, GPTConfig, attention_weights
from tests.conftest import assert_one_line_error

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\n"
TEXT = "ROMEO: but soft,\nwhat light!\té🙂 " + HOSTILE + "</script>&amp;"


def make_model_folder(folder: Path, text: str = TEXT, **sizes: int) -> Path:
    """A model with random weights that are large enough for attention to differ."""
    tokenizer = CharTokenizer.from_text(text)
    sizes = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32} | sizes
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(model, folder)
    save_tokenizer(tokenizer, folder, sizes["block_size"])
    return folder


def page_data(page: Path) -> dict:
    html = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.S)[1])


def decode(encoded: dict) -> np.ndarray:
    import base64

    if "float32" in encoded:
        return np.frombuffer(base64.b64decode(encoded["float32"]), "<f4")
    return np.frombuffer(base64.b64decode(encoded["int16"]), "<i2") * encoded["scale"]


# --- Without a browser ---


def test_the_numbers_of_the_page_are_those_of_the_model(tmp_path, call):
    folder = make_model_folder(tmp_path / "model")
    output = tmp_path / "page.html"
    result = call(explain, f"--init_from={folder}", f"--start={TEXT[:20]}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert str(output) in result.stdout and output.as_uri() in result.stdout
    data, model = page_data(output), load_model(folder)
    (checkpoint,) = data["checkpoints"]
    idx = torch.tensor([data["ids"]])
    loss = model(idx[:, :-1], idx[:, 1:]).item()
    assert np.mean(checkpoint["losses"]) == pytest.approx(loss, abs=1e-3)
    block = model.transformer.h[0]
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(20))
    q, k, v = block.attn.qkv(block.ln_1(x))
    scores = decode(checkpoint["scores"]).reshape(2, 2, -1)[0]  # (n_head, 20 * 21 / 2)
    lower = torch.ones(20, 20, dtype=torch.bool).tril()
    np.testing.assert_allclose(scores, (q @ k.mT)[0][:, lower].detach(), atol=2e-3)
    messages = decode(checkpoint["messages"]).reshape(2, 2, 20, 16)[0]
    np.testing.assert_allclose(messages, (attention_weights(q, k) @ v)[0].detach(), atol=2e-3)
    last = checkpoint["layers"][-1]  # after the last block: what the model predicts
    probs = model(idx)[0].softmax(-1)
    assert last["actual"][:-1] == pytest.approx(probs[range(19), idx[0, 1:]].tolist(), abs=1e-4)
    assert last["actual"][-1] is None


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the\n", "␣the↵"), ("é🙂".encode(), "é🙂"), (b"\xe2\x80", "<E2><80>"), (b"\t\r", "⇥␍"),
        (b"a\x00", "a<U+0000>"), ("\u202e".encode(), "<U+202E>"), (b"", ""),
    ],
)  # fmt: skip
def test_special_characters_are_shown_clearly(token, shown):
    assert explain.visible(token) == shown


def test_no_text_can_end_the_data_element(tmp_path, call):
    folder = make_model_folder(tmp_path / "model")
    output = tmp_path / "page.html"
    call(explain, f"--init_from={folder}", f"--start={TEXT}", f"--output={output}")
    html = output.read_text(encoding="utf-8")
    assert html.count("</script>") == 2  # of the data, and of the program
    data = page_data(output)
    assert "".join(data["vocab"][str(i)] for i in data["ids"]).startswith("ROMEO:␣but␣soft,↵what")


def test_without_start_the_page_shows_the_validation_text(tmp_path, call):
    text = "abcdefghij" * 30 + "jihgfedcba" * 6
    folder = make_model_folder(tmp_path / "run", text)
    splits = split_text(text, 0.2)
    write_dataset(tmp_path / "letters", CharTokenizer.from_text(text), splits, {"source": "test"})
    (folder / "settings.json").write_text(json.dumps({"dataset": str(tmp_path / "letters")}))
    assert call(explain, f"--out_dir={folder}", "--max_tokens=30").returncode == 0
    data = page_data(folder / "explain.html")
    shown = "".join(data["vocab"][str(i)] for i in data["ids"])
    assert shown == splits["val"][0][:30]


def test_texts_that_cannot_be_shown_are_refused_or_cut(tmp_path, call):
    source = f"--init_from={make_model_folder(tmp_path / 'model')}"
    output = f"--output={tmp_path / 'page.html'}"
    result = call(explain, source, output, "--start=" + "ROMEO: " * 200, "--max_tokens=40")
    assert result.returncode == 0 and "first 40 of 1,400 tokens" in result.stdout
    for flags, words in (
        (["--start=x", "--max_tokens=1024"], "at most 256"),
        (["--start=R"], "at least 2 tokens"),
        (["--start=Ω and others"], "--start: the character 'Ω'"),
        ([], "give a text with --start"),
    ):
        assert_one_line_error(call(explain, source, output, *flags), words)


def test_pages_are_small(tmp_path, call):
    """2 MB for 128 tokens at 4 layers and 4 heads; 5 MB for 64 tokens at GPT-2's sizes."""
    text = "".join(map(chr, range(32, 97))) * 2
    folder = make_model_folder(
        tmp_path / "char", text, block_size=128, n_layer=4, n_head=4, n_embd=128
    )
    output = tmp_path / "page.html"
    flags = [f"--output={output}", "--max_tokens=128", f"--start={text[:128]}"]
    assert call(explain, f"--init_from={folder}", *flags).returncode == 0
    assert len(page_data(output)["ids"]) == 128
    assert output.stat().st_size < 2e6
    characters = "".join(map(chr, range(0x10000, 0x10000 + 50_257)))  # as many as GPT-2's tokens
    folder = make_model_folder(
        tmp_path / "gpt2", characters, block_size=64, n_layer=12, n_head=12, n_embd=768 // 4
    )
    flags = [f"--output={output}", f"--start={characters[:64]}"]
    assert call(explain, f"--init_from={folder}", *flags).returncode == 0
    assert output.stat().st_size < 5e6


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
def run_folder(tmp_path_factory):
    """A run with two snapshots."""
    torch.manual_seed(0)
    folder = make_model_folder(tmp_path_factory.mktemp("page") / "run")
    for step in (100, 200):
        make_model_folder(folder / f"step_{step:06}")
    return folder


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
    """Open a page; at the end, it must have sent no request and logged no error."""
    contexts, requests, messages = [], [], []

    def open_page(path: Path, width: int = 1280, height: int = 720, theme: str = "light"):
        contexts.append(
            browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
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


def test_attention_in_the_page_equals_attention_weights(open_page, page_file, run_folder):
    page, data = open_page(page_file), page_data(page_file)
    model, idx = load_model(run_folder), torch.tensor([page_data(page_file)["ids"]])
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.size(1)))
    for layer, block in enumerate(model.transformer.h):
        q, k, _ = block.attn.qkv(block.ln_1(x))
        expected = attention_weights(q, k)[0]
        for head in range(data["n_head"]):
            for t in (0, 7, 31):
                row = page.evaluate(f"attentionWeights({layer}, {head}, {t})")
                assert row == pytest.approx(expected[head, t, : t + 1].tolist(), abs=1e-3)
        x = block(x)


@pytest.mark.parametrize("max_logits", [1000, 6])
def test_sliders_reshape_probabilities_as_sampling_does(
    open_page, run_folder, tmp_path, monkeypatch, max_logits
):
    """With max_logits=6, most of the vocabulary is in the page as one sum per temperature."""
    monkeypatch.setattr(explain, "MAX_LOGITS", max_logits)
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    file = write_page(folder)
    page, data = open_page(file), page_data(file)
    logits = load_model(folder)(torch.tensor([data["ids"]]))[0]
    for temperature, top_k, top_p in (
        (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (0.8, 5, 0.9), (0.1, 0, 0.5),
        (1.0, 1, 1.0), (1.0, 0, 0.3),
    ):  # fmt: skip
        probs = sampling_probs(logits, temperature, top_k, top_p)
        for t in (0, 20):
            shown = page.evaluate(f"samplingProbs({t}, {temperature}, {top_k}, {top_p})")
            ids = data["checkpoints"][-1]["logit_ids"][t]
            assert len(shown) == len(ids) == min(max_logits, logits.size(1))
            if top_p < 1 and sum(probs[t, ids] > 0) == len(ids) < logits.size(1):
                continue  # the nucleus ends among tokens that the page does not have one by one
            assert shown == pytest.approx(probs[t, ids].tolist(), abs=2e-4)


def test_clicks_and_keys_change_what_they_should(open_page, page_file):
    page = open_page(page_file)
    page.click('.token[data-position="5"]')
    assert page.inner_text("h2 .selected-token >> nth=0") == ":"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.position") == 6
    assert page.inner_text("h2 .selected-token >> nth=0") == "␣"
    assert page.get_attribute(".token.selected", "data-position") == "6"
    assert page.evaluate("document.activeElement.dataset.position") == "6"
    page.keyboard.press("l")
    page.keyboard.press("h")
    assert "layer 2 of 2, head 2 of 2" in page.inner_text(".current-head >> nth=0")
    page.keyboard.press("H")
    page.click('#heads button[data-layer="0"][data-head="1"]')
    assert "layer 1 of 2, head 2 of 2" in page.inner_text(".current-head >> nth=0")
    assert (
        page.get_attribute('#heads button[data-layer="0"][data-head="1"]', "aria-pressed") == "true"
    )
    rows = page.locator("#message tr").count()
    assert rows == 9  # a header, seven tokens, the sum
    page.click('.token[data-position="30"]')
    page.click("#more")
    assert page.locator("#message tr").count() == 33
    page.hover("#table", position={"x": 5, "y": 300})
    assert "←" in page.inner_text("#cell")
    assert page.locator(".token.hovered").count() == 1
    page.hover("#table", position={"x": 400, "y": 5})
    assert "the future" in page.inner_text("#cell")


def test_the_prediction_table_marks_the_actual_next_token(open_page, page_file, run_folder):
    page, data = open_page(page_file), page_data(page_file)
    page.click('.token[data-position="9"]')
    row = page.locator("#prediction tr.actual")
    assert data["vocab"][str(data["ids"][10])] in row.inner_text()
    logits = load_model(run_folder)(torch.tensor([data["ids"]]))[0, 9]
    page.evaluate('document.getElementById("top-k").value = 2')
    page.dispatch_event("#top-k", "input")
    page.evaluate('document.getElementById("temperature").value = 4')  # 0.5
    page.dispatch_event("#temperature", "input")
    first = page.locator("#prediction tr").first
    expected = sampling_probs(logits[None], temperature=0.5, top_k=2).max().item()
    assert float(first.get_attribute("data-probability")) == pytest.approx(expected, abs=1e-4)
    assert page.inner_text("#top-k-value") == "2"


def test_the_training_slider_shows_earlier_weights(open_page, page_file, run_folder):
    page = open_page(page_file)
    assert page.inner_text("#checkpoint-label") == "best weights"
    final = page.evaluate("attentionWeights(0, 0, 9)")
    page.evaluate('document.getElementById("checkpoint").value = 0')
    page.dispatch_event("#checkpoint", "input")
    assert page.inner_text("#checkpoint-label") == "step 100"
    early = page.evaluate("attentionWeights(0, 0, 9)")
    assert max(abs(a - b) for a, b in zip(early, final, strict=True)) > 0.01


def test_texts_with_html_do_nothing(open_page, tmp_path):
    page = open_page(write_page(make_model_folder(tmp_path / "model"), TEXT[30:90]))
    page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#text script, #text img").count() == 0
    assert "<script>" in page.inner_text("#text").replace("\n", "")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_the_screen_and_is_readable(open_page, page_file, theme, width, height):
    page = open_page(page_file, width, height, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
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
