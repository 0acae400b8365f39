"""Which token begins a text, ends it, pads: what a file says of its tokenizer goes before what the names suggest."""

import io
import json
import pickle
import shutil

import pytest
import tokenizers

from tinylm.config import ModelConfig
from tinylm.formats import gguf, hf, llama2c, pieces
from tinylm.formats import gguf_models as models
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer, TokenizerError
from tinylm.vocabulary import ROLES, marked

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fill>", "<gap>")  # of an instruct model
TEXT = Tokenizer.train(["One day, a fox met a wolf. The end."] * 3, vocab=280).to_json()
for ours, theirs in zip(Tokenizer.SPECIALS, NAMES, strict=True):
    TEXT = TEXT.replace(json.dumps(ours), json.dumps(theirs))
PLAIN = Tokenizer.from_json(TEXT)
CHAT = PLAIN.with_roles({"end": 2, "pad": 3})


def document(**changes):
    """The json of PLAIN with other added tokens: name -> entries."""
    raw = json.loads(TEXT)
    for token in raw["added_tokens"]:
        token |= changes.get(token["content"].strip("<|>"), {})
    return raw


def model(tokenizer, **settings):
    wanted = {"vocab": 300, "context": 16, "width": 8, "layers": 1, "heads": 2, **settings}
    return Transformer(ModelConfig(**wanted), rngs=0, tokenizer=tokenizer)


# --- the document -----------------------------------------------------------------------------------------------------


def test_roles_are_part_of_the_tokenizer(tmp_path):
    assert (PLAIN.begin, PLAIN.end, PLAIN.pad) == (0, 0, None)
    assert (CHAT.begin, CHAT.end, CHAT.pad, CHAT.mask) == (0, 2, 3, None)
    assert PLAIN != CHAT
    assert PLAIN.sha256 != CHAT.sha256
    for again in (Tokenizer.load(CHAT.save(tmp_path)), pickle.loads(pickle.dumps(CHAT))):
        assert again == CHAT
        assert (again.begin, again.end, again.pad) == (0, 2, 3)
    text = "One day, <|im_end|> a fox"
    assert CHAT.encode(text).tolist() == PLAIN.encode(text).tolist()
    assert CHAT.decode([2, 3]) == ""
    assert tokenizers.Tokenizer.from_str(CHAT.to_json()).encode("One day").ids == PLAIN.encode("One day").tolist()


def test_where_the_names_say_the_same_nothing_is_added():
    assert PLAIN.with_roles({"begin": 0, "end": 0, "pad": None}) is PLAIN
    assert PLAIN.with_roles({"end": 20, "pad": -1, "mask": 10**9}) == PLAIN  # no added tokens
    assert marked(json.loads(TEXT), {"begin": 0}) == json.loads(TEXT)
    assert CHAT.with_roles({"end": 2}) is CHAT
    assert "roles" not in PLAIN.to_json()
    with pytest.raises(TokenizerError, match="roles first: known are begin, end, pad"):
        PLAIN.with_roles({"first": 0})


def test_one_role_may_change_another():
    raw = document(endoftext={"content": "<a>"}, im_start={"content": "</s>"})
    raw["model"]["vocab"] |= {"<a>": raw["model"]["vocab"].pop("<|endoftext|>")}
    raw["model"]["vocab"] |= {"</s>": raw["model"]["vocab"].pop("<|im_start|>")}
    bare = Tokenizer(raw)
    assert (bare.begin, bare.end, bare.sep) == (1, 1, 1)
    both = bare.with_roles({"begin": 1, "end": 2})  # </s> began texts only as long as it ended them
    assert (both.begin, both.end, both.sep) == (1, 2, 1)
    back = both.with_roles({"end": 1})
    assert (back.begin, back.end) == (1, 1)


def test_an_added_token_becomes_special_where_it_has_a_role():
    raw = document(im_end={"special": False})
    chat = Tokenizer(raw).with_roles({"end": 2})
    assert chat.end == 2
    assert "<|im_end|>" in chat.specials
    x = raw["model"]["vocab"]["x"]
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": x, "content": "x", "special": False})
    kept = Tokenizer(raw).with_roles({"begin": 1, "end": x})  # any text with an x would end there
    assert (kept.begin, kept.end) == (1, 0)
    assert "x" not in kept.specials


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"im_end": {"roles": ["last"]}}, r"roles = \['last'\]: known are begin, end, pad, mask, cls, sep"),
        ({"im_end": {"roles": []}}, r"roles = \[\]"),
        ({"im_end": {"roles": "end"}}, "roles = 'end'"),
        ({"im_end": {"roles": [["end"]]}}, "roles = "),
        ({"im_end": {"roles": ["end"], "special": False}}, "has roles, not special"),
        ({"im_end": {"roles": ["end"]}, "im_start": {"roles": ["pad", "end"]}}, "the role end is given twice"),
        ({"im_end": {"role": ["end"]}}, "needs exactly id, content"),
    ],
)
def test_roles_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(document(**changes))


# --- folders of transformers ------------------------------------------------------------------------------------------


def told(tmp_path, config=None, words=None, generation=None, tokenizer=PLAIN):
    """What is read of a folder that is not ours, whose three files say this."""
    folder = hf.write(model(tokenizer), tmp_path / "theirs")
    tokenizer.save(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if not k.endswith("_token_id") and k not in (hf.MARK, hf.FIT)}
    for name, said in (
        ("config", raw | (config or {})),
        ("tokenizer_config", words),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(said or {}))
    found = hf.read(folder).tokenizer
    shutil.rmtree(folder)
    return tuple(getattr(found, role) for role in ROLES), found


def test_a_folder_says_which_tokens_begin_and_end(tmp_path):
    none = (0, 0, None, None, None, None)
    assert told(tmp_path) == (none, PLAIN)
    assert told(tmp_path, {"bos_token_id": 0, "eos_token_id": 0}) == (none, PLAIN)
    chat = told(tmp_path, {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3})
    assert chat == ((0, 2, 3, None, None, None), CHAT)
    words = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "mask_token": "<gap>"}
    words |= {"cls_token": "<fill>", "sep_token": "<gap>", "pad_token": None}
    assert told(tmp_path, words=words)[0] == (1, 2, None, 4, 3, 4)
    assert told(tmp_path, {"eos_token_id": 3}, words)[0] == (1, 3, None, 4, 3, 4)  # config.json before the others
    assert told(tmp_path, generation={"eos_token_id": [2, 0], "pad_token_id": 0})[0] == (0, 2, 0, None, None, None)
    assert told(tmp_path, {"eos_token_id": [20, 2, 3]})[0][1] == 2  # 20 is a piece of text


def test_a_folder_may_say_what_cannot_be(tmp_path):
    for said in (-1, 10**9, 20, True, "2", [], [None], {"a": 1}, 2.0):
        assert told(tmp_path, {"bos_token_id": said, "eos_token_id": said})[1] == PLAIN
    for said in ("nothing of this name", 7, ["<|im_end|>"], {"content": 3}, {}):
        assert told(tmp_path, words={"eos_token": said})[1] == PLAIN
    loose = Tokenizer(document(im_end={"special": False}))
    assert told(tmp_path, {"eos_token_id": 2}, tokenizer=loose)[1].specials["<|im_end|>"] == 2
    folder = hf.write(model(PLAIN), tmp_path / "damaged")
    (folder / "generation_config.json").write_text("{")
    with pytest.warns(UserWarning, match=r"generation_config\.json is damaged.*not used") as seen:
        assert hf.read(folder).tokenizer == PLAIN
    assert seen[0].filename == __file__


@pytest.mark.parametrize("settings", [{}, {"kind": "encoder", "head": "none", "block": "post", "norm": "layernorm"}])
def test_roles_go_out_and_come_back(settings, tmp_path):
    if settings:
        settings = {**settings, "positions": "learned", "bias": True, "mlp": "gelu", "embed_norm": True}
    chat = CHAT.with_roles({"cls": 1, "sep": 4, "mask": 3})
    folder = hf.write(model(chat, **settings), tmp_path)
    raw, words = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (0, 2, 3)
    assert (words["bos_token"], words["eos_token"], words["cls_token"]) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert '"roles"' not in (folder / "tokenizer.json").read_text()  # transformers would print a line about each
    back = hf.read(folder).tokenizer
    assert back == chat
    assert (back.end, back.pad, back.cls, back.sep, back.mask) == (2, 3, 1, 4, 3)


# --- the frame of a text, as transformers puts it ---------------------------------------------------------------------


def frame(folder):
    return json.loads((folder / "tokenizer.json").read_text())["post_processor"]


def test_the_frame_is_written_and_taken_off_again(tmp_path):
    folder = hf.write(model(PLAIN), tmp_path / "ours")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    one, two = PLAIN.encode("One day").tolist(), PLAIN.encode("a fox").tolist()
    assert theirs.encode("One day").ids == [0, *one]
    assert theirs.encode("One day", "a fox").ids == [0, *one, 0, *two]
    assert hf.read(folder).tokenizer == PLAIN
    framed = Tokenizer.load(folder)  # a tokenizer that came with this very frame keeps it
    assert framed != PLAIN
    assert hf.read(hf.write(model(framed), tmp_path / "framed")).tokenizer == framed
    raw = json.loads(TEXT)
    del raw["post_processor"]
    short = Tokenizer(raw)
    assert hf.read(hf.write(model(short), tmp_path / "short")).tokenizer == short
    level = Tokenizer({**raw, "post_processor": raw["decoder"]})
    folder = hf.write(model(level), tmp_path / "level")
    assert frame(folder)["processors"] == [raw["decoder"], frame(tmp_path / "ours")]
    assert hf.read(folder).tokenizer == level
    strange = Tokenizer({**raw, "post_processor": {"type": "Sequence"}})
    assert hf.read(hf.write(model(strange), tmp_path / "strange")).tokenizer == strange


def test_a_frame_that_somebody_changed_stays(tmp_path):
    folder = hf.write(model(PLAIN), tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"]["single"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert hf.read(folder).tokenizer == Tokenizer(raw)


def test_sentencepiece_says_which_pieces_begin_and_end(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="the library that writes such files")
    for kind in ("bpe", "unigram"):
        made = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g < > i n o v r"] * 50), model_writer=made, vocab_size=30,
            model_type=kind, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=9,
            bos_piece="<begin>", eos_piece="<over>", hard_vocab_limit=False,
        )  # fmt: skip
        (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
        found = pieces.tokenizer_of(tmp_path)
        assert (found.names[found.begin], found.names[found.end]) == ("<begin>", "<over>")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_says_which_tokens_begin_and_end(tmp_path):
    chat = CHAT.with_roles({"cls": 1, "mask": 4, "sep": 4})
    path = models.write(model(chat, vocab=chat.vocab), tmp_path / "m.gguf")
    said = gguf.open_file(path).metadata
    ids = {"bos": 0, "eos": 2, "padding": 3, "mask": 4, "cls": 1, "seperator": 4}
    assert {role: said[f"tokenizer.ggml.{role}_token_id"] for role in ids} == ids
    back = models.read(path).tokenizer
    assert [getattr(back, role) for role in ROLES] == [0, 2, 3, 4, 1, 4]
    assert back.sha256 == models.read(models.write(models.read(path), tmp_path / "n.gguf")).tokenizer.sha256
    plain = models.write(model(PLAIN, vocab=PLAIN.vocab), tmp_path / "plain.gguf")
    assert "roles" not in models.read(plain).tokenizer.to_json()
    assert not any("cls" in key or "sep" in key for key in gguf.open_file(plain).metadata)


def test_gguf_roles_reach_a_folder_and_come_back(tmp_path):
    there = models.read(models.write(model(CHAT, vocab=CHAT.vocab), tmp_path / "m.gguf"))
    back = hf.read(hf.write(there, tmp_path / "folder"))
    assert back.tokenizer == there.tokenizer
    assert (back.tokenizer.begin, back.tokenizer.end, back.tokenizer.pad) == (0, 2, 3)


def test_begin_stays_where_no_program_puts_it_before_a_prompt(tmp_path):
    path = models.write(model(CHAT, vocab=CHAT.vocab), tmp_path / "m.gguf")
    raw = path.read_bytes()
    key = b"tokenizer.ggml.add_bos_token\x07\0\0\0"
    assert raw.count(key + b"\1") == 1
    path.write_bytes(raw.replace(key + b"\1", key + b"\0"))
    assert gguf.open_file(path).metadata["tokenizer.ggml.add_bos_token"] is False
    assert models.read(path).tokenizer.begin == 0


def test_published_files_keep_their_tokenizers(shared_data, tmp_path):
    """Where names and files agree, as they nearly always do, the hash is what it was."""
    from tinylm.formats import gguf_tokenizers

    for name in ("bert-bge", "gpt-2", "llama-spm"):
        found = gguf_tokenizers.tokenizer_of(shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf")
        assert not any("roles" in token for token in json.loads(found.to_json())["added_tokens"])
    story = llama2c.read(shared_data / "ckpt" / "stories260K" / "stories260K.bin")
    assert hf.read(hf.write(story, tmp_path)).tokenizer == story.tokenizer
