"""Text towers give what open_clip and transformers give for the same weights, and the same ids for the same text."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.formats import clip, keymap
from ldm.errors import LdmError
from ldm.model import load_pretrained
from ldm.models.conditioner.hf_clip import HFClipText
from ldm.models.conditioner.open_clip import OpenClipText
from ldm.models.conditioner.tokenizer import Tokenizer
from tests.interop import making

PROMPTS = ["a red fox, flat logo", "", "word " * 100, "déjà vu 🦊"]
# float32: reference and ours add in another order; float64 shows that nothing but rounding differs
LIMITS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


# ---- open_clip, which is installed always


def whole_clip(quick_gelu: bool, **text):
    """A small CLIP model of open_clip's and the description that makes its text tower."""
    from open_clip.model import CLIP

    config = {"embed_dim": 48, "text_cfg": {"width": 64, "heads": 2, "layers": 4, **text}, "quick_gelu": quick_gelu}
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    model = CLIP(config["embed_dim"], vision, config["text_cfg"], quick_gelu=quick_gelu).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("visual"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model, config


@pytest.mark.parametrize("dtype, limit", LIMITS)
@pytest.mark.parametrize("layer, final_norm, quick_gelu", [(-1, True, True), (-2, True, False), (-3, False, True)])
def test_open_clip_itself(tmp_path, dtype, limit, layer, final_norm, quick_gelu):
    reference, config = whole_clip(quick_gelu)
    save_file(reference.state_dict(), tmp_path / "clip.safetensors")
    options = {"width": 64, "final_norm": final_norm, "pooled": True, "weights": str(tmp_path / "clip.safetensors")}
    ours = OpenClipText(config, layer=layer, **options)
    load_pretrained(ours)
    ours, reference = ours.to(dtype), reference.to(dtype)
    ids = torch.tensor(Tokenizer(77, 0).padded(PROMPTS))
    found = ours.encode(ids)
    with torch.no_grad():
        theirs = reference.forward_intermediates(
            text=ids, text_indices=[4 + layer], normalize_intermediates=final_norm, normalize=False
        )
        pooled = reference.encode_text(ids)
    assert making.relative(found.tokens, theirs["text_intermediates"][0]) < limit
    assert making.relative(found.vector, pooled) < limit
    early = OpenClipText(config, layer=layer, width=64, final_norm=final_norm).to(dtype)  # stops at the layer
    early.load_state_dict(ours.state_dict())
    assert torch.equal(early.encode(ids).tokens, found.tokens)
    other = OpenClipText({**config, "quick_gelu": not quick_gelu}, layer=layer, width=64, final_norm=final_norm).to(
        dtype
    )
    other.load_state_dict(ours.state_dict())
    assert making.relative(other.encode(ids).tokens, found.tokens) > 100 * limit  # the comparison sees the activation


def test_another_layout_of_open_clips_files(tmp_path):
    reference, config = whole_clip(False)
    text = {k: v for k, v in reference.state_dict().items() if not k.startswith(("visual", "logit_scale"))}
    torch.save({"state_dict": {f"module.text.{k}": v for k, v in text.items()}}, tmp_path / "clip.pt")
    ours = OpenClipText(config, width=64, weights=str(tmp_path / "clip.pt"))
    load_pretrained(ours)
    assert all(torch.equal(v, text[k.removeprefix("tower.")]) for k, v in ours.state_dict().items())


def test_weights_are_whole_and_the_declared_ones(tmp_path):
    reference, config = whole_clip(False)
    path = tmp_path / "clip.safetensors"
    tensors = reference.state_dict()
    save_file({k: v for k, v in tensors.items() if k != "ln_final.bias"}, path)
    ours = OpenClipText(config, width=64, weights=str(path))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(LdmError, match=r"1 missing: tower\.ln_final\.bias"):
        load_pretrained(ours)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    with pytest.raises(LdmError, match="not the declared file"):
        load_pretrained(OpenClipText(config, width=64, weights=str(path), sha256="0" * 64))
    with pytest.raises(LdmError, match="no such file"):
        load_pretrained(OpenClipText(config, width=64, weights=str(tmp_path / "gone.safetensors")))


@pytest.mark.parametrize("pooled, final_norm", [(False, True), (True, True), (False, False)])
def test_a_trained_tower_has_a_gradient_for_all_that_is_trained_and_a_frozen_one_none(pooled, final_norm):
    _, config = whole_clip(False)
    tower = OpenClipText(config, width=64, trained=True, pooled=pooled, final_norm=final_norm)
    cond = tower(["a fox", "a star"])
    (cond.tokens.square().sum() + (cond.vector.square().sum() if pooled else 0)).backward()
    trained = [n for n, p in tower.named_parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for n, p in tower.named_parameters() if n in trained)
    assert all(p.grad is None for n, p in tower.named_parameters() if n not in trained)
    assert ("tower.text_projection" in trained) == pooled
    frozen = OpenClipText(config, width=64, pooled=pooled)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.train().training
    assert not frozen(["a fox"]).tokens.requires_grad


def test_what_networks_are_told_about_a_tower():
    _, config = whole_clip(False)
    tower = OpenClipText(config, width=64, pooled=True)
    assert (tower.width, tower.vector_size, tower.reads) == (64, 48, ("caption",))
    assert tower.provides == {"tokens", "vector"} and tower(["a"]).mask is None
    assert OpenClipText(config, width=64).vector_size is None
    coca = OpenClipText("coca_ViT-B-32", width=512, layer=-1, pooled=True)(["a", "b c"])  # with a class token behind
    assert coca.tokens.shape == (2, 76, 512) and coca.vector.shape == (2, 512)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"config": "ViT-H-15"}, "no architecture 'ViT-H-15'"),
        ({"config": "hf-hub:some/where"}, "no architecture"),
        ({"config": "roberta-ViT-B-32"}, "comes from a hub"),
        ({"config": "ViT-B-16-SigLIP"}, "comes from a hub"),
        ({"config": "ViT-B-32"}, "width is 1024, but the tower of 'ViT-B-32' has 512"),
        ({"config": "ViT-B-32", "width": 512, "layer": 0}, "layer must be -1"),
        ({"config": "ViT-B-32", "width": 512, "layer": -13}, "to -12"),
        ({"config": {"embed_dim": 8}}, "embed_dim and text_cfg"),
        ({"config": {"embed_dim": 8, "text_cfg": {"vocab_size": 100, "width": 64}}}, "has 100 tokens"),
    ],
)
def test_towers_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        OpenClipText(**arguments)


# ---- transformers


@pytest.mark.parametrize("dtype, limit", LIMITS)
@pytest.mark.parametrize("family, skip", [("sd1", 0), ("sd1", 1), ("sd2", 0)])
def test_transformers(dtype, limit, family, skip):
    """SD1's and SD2's text model, in open_clip's tower through the key map and in `HFClipText` by its own names."""
    pytest.importorskip("transformers")
    reference = making.text_encoder(family).to(dtype)
    theirs = {("" if k.startswith("text_model.") else "text_model.") + k: v for k, v in reference.state_dict().items()}
    args = making.our_text(family)
    args["config"]["text_cfg"]["proj_type"] = "none"
    ours = OpenClipText(**{**args, "layer": -1 - skip}).to(dtype)
    table = clip.map_transformers(ours.state_dict())
    keymap.check_shapes(
        keymap.their_shapes(table, {k: tuple(v.shape) for k, v in ours.state_dict().items()}),
        {k: tuple(v.shape) for k, v in theirs.items()},
        "transformers",
    )
    ours.load_state_dict(keymap.to_ours(table, theirs))
    ids = torch.tensor(ours.tokenizer.padded(PROMPTS))
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True)
        norm = getattr(reference, "text_model", reference).final_layer_norm
        expected = norm(hidden.hidden_states[-1 - skip]) if skip else hidden.last_hidden_state
    assert making.relative(ours.encode(ids).tokens, expected) < limit

    same = HFClipText({**making.TEXTS[family]}, width=64, clip_skip=skip, pooled=True).to(dtype)
    same.load_state_dict(same.own_names(theirs))
    found = same.encode(ids)
    assert making.relative(found.tokens, expected) < limit
    assert making.relative(found.vector, hidden.pooler_output) < limit


def test_a_text_model_from_a_local_folder(tmp_path):
    pytest.importorskip("transformers")
    reference = making.text_encoder("sd1")
    reference.save_pretrained(tmp_path)
    ours = HFClipText(making.TEXTS["sd1"], width=64, weights=str(tmp_path), trained=True, clip_skip=1)
    load_pretrained(ours)
    cond = ours(PROMPTS)
    with torch.no_grad():
        hidden = reference(torch.tensor(ours.tokenizer.padded(PROMPTS)), output_hidden_states=True).hidden_states[-2]
        expected = getattr(reference, "text_model", reference).final_layer_norm(hidden)
    assert making.relative(cond.tokens, expected) < 1e-5
    cond.tokens.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in ours.parameters())
    assert ours.vector_size is None and ours.provides == {"tokens"}
    with pytest.raises(LdmError, match=r"hidden_act=quick_gelu \(not gelu\).*model.conditioner.config"):
        load_pretrained(HFClipText(making.TEXTS["sd2"], width=64, weights=str(tmp_path)))


# ---- the vocabulary

NASTY = [
    "a red fox", "", " ", "A RED FOX", "it's they'll we'd I'm you've", "don't stop", "x" * 300, "word " * 200,
    "1234567890", "3.14, 2/3 & 50%", "a\tb\nc\r\nd", "  many   spaces  ", "naïve café déjà vu", "Ünïcödé ÄÖÜß",
    "日本語のテキスト", "العربية", "русский текст", "🦊🔥👩‍👩‍👧", "a!b", "!!!", "<b>bold</b>", "(a:1.2), [b]",
    "C:\\path\\file", "quote \"double\" 'single'", "#hash @at ~tilde ^caret", "zero\u200bwidth", "e\u0301 combining",
    "\U0001d538\U0001d539", "ª º ½", "a_b-c+d=e",
]  # fmt: skip
# What open_clip does to a text before it cuts it up, and transformers 5 does not: ftfy's repairs (other characters for
# ligatures, wide letters and curly quotes, and for text that was decoded wrongly) and HTML's entities. In the other
# direction "!" is padding for a tokenizer with pad_id 0, and each side has its own spelling of the two special tokens.
DIFFERENT = ["&amp;", "&lt;b&gt;", "ﬁne", "ＦＵＬＬ", "“curly”", "doesnâ€™t"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    pytest.importorskip("transformers")
    home = tmp_path_factory.mktemp("tokenizers")
    return {pad: making.tokenizer(home / str(pad), pad) for pad in (49407, 0)}


def their_ids(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids


@pytest.mark.parametrize("pad_id", [49407, 0])
def test_ids_are_those_of_transformers(tokenizers, pad_id):
    texts = [text for text in NASTY if pad_id or "!" not in text]
    ours = Tokenizer(77, pad_id).padded(texts)
    for text, mine, theirs in zip(texts, ours, their_ids(tokenizers[pad_id], texts), strict=True):
        assert mine == theirs, repr(text)


def test_where_ids_differ_is_known(tokenizers):
    for text in DIFFERENT:
        assert Tokenizer().padded([text]) != their_ids(tokenizers[49407], [text]), repr(text)
    assert Tokenizer(77, 0).padded(["wow!"]) != their_ids(tokenizers[0], ["wow!"])
    assert Tokenizer(77, 49407).padded(["wow!"]) == their_ids(tokenizers[49407], ["wow!"])
    assert Tokenizer(77, 0).padded(["fox"]) != their_ids(tokenizers[49407], ["fox"])  # the padding


def test_the_vocabulary_is_written_as_transformers_reads_it(tokenizers):
    tokens, merges = clip.vocabulary()
    assert len(tokens) == 49408 and len(merges) == 48894 and tokens["<|endoftext|>"] == 49407
    data = json.loads(tokenizers[0].backend_tokenizer.to_str())
    assert data["model"]["vocab"] == tokens and tokenizers[0].pad_token_id == 0
    assert tokenizers[49407].pad_token_id == 49407 and tokenizers[49407].model_max_length == 77
