"""Write a GPT-2 of ours as GGUF, the file of llama.cpp and of what is built on it.

    check_gguf(model.config, tokenizer.kind, contents)   # contents: of tokenizer.json
    save_gguf(model, contents, end, None, Path("FOLDER/model.gguf"))

The file holds all: sizes, tensors, and the tokenizer (github.com/ggml-org/ggml, docs/gguf.md). The
names of its tensors are in NAMES; its matrices are (out, in) as ours. llama.cpp's GPT-2 has GELU by
its approximation and biases everywhere, and cuts text by GPT-2's pattern before byte-pair encoding:
a model or a tokenizer that has something else is refused.
"""

import os

import torch

from configurator import UserError
from exchange.huggingface import PREFIX, REQUIRED_SETTINGS, beyond_gpt2, with_biases

NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
         "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
         "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
PRE_TOKENIZER = "gpt-2"  # llama.cpp's name of GPT-2's pattern


def check_gguf(config, kind, tokenizer):
    """Raise UserError where llama.cpp could not compute a GPTConfig, or encode as its tokenizer.

    kind: that of the tokenizer. tokenizer: the contents of Hugging Face's tokenizer.json for it.
    """
    others = beyond_gpt2(config)
    if config.mlp != "gelu":
        others = others or f"mlp={config.mlp}"
    if others:
        raise UserError(f"llama.cpp's GPT-2 cannot compute a model with {others}; write it with "
                        "--to=huggingface")
    if kind not in ("gpt2", "bpe"):
        raise UserError(f"llama.cpp cannot encode as the tokenizer {kind}; only models with a "
                        "byte-pair encoding (--tokenizer=gpt2 or bpe) can be written")
    cuts_as_gpt2 = tokenizer["pre_tokenizer"].get("use_regex", False)
    if not cuts_as_gpt2 or tokenizer["model"]["ignore_merges"]:
        raise UserError("llama.cpp would encode text in another way than this tokenizer: it is not "
                        "cut by GPT-2's pattern, or has tokens that no merge makes")


def save_gguf(model, tokenizer, end, chat_template, path, dtype=torch.float32):
    """Write a GPT, which check_gguf has not refused, into a file.

    tokenizer: the contents of Hugging Face's tokenizer.json, where the merges are. end: the id at
    which generation stops. chat_template: text, or None. dtype: of the matrices, float32 or
    float16. Raises UserError where the package gguf is missing.
    """
    try:
        from gguf import GGUFWriter, LlamaFileType, TokenType
    except ImportError as error:
        raise UserError("--to=gguf needs the package gguf: pip install gguf==0.19.0") from error

    # the sizes
    c, unfinished = model.config, path.with_name(path.name + ".tmp")
    writer = GGUFWriter(unfinished, "gpt2")
    writer.add_name(path.parent.name)
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(REQUIRED_SETTINGS["layer_norm_epsilon"])
    half = dtype == torch.float16
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if half else LlamaFileType.ALL_F32)

    # the tokenizer
    ids = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    types = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_eos_token_id(end)
    if chat_template:
        writer.add_chat_template(chat_template)

    # the tensors; what is not multiplied stays in float32
    for name, tensor in with_biases(model, len(tokens)).items():
        if tensor.dim() == 2 and not name.endswith("wpe.weight"):
            tensor = tensor.to(dtype)
        writer.add_tensor(gguf_name(name), tensor.numpy())

    # the file, under another name until it is whole
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)


def gguf_name(name):
    """Return GGUF's name of a tensor: "transformer.h.0.ln_1.bias" is "blk.0.attn_norm.bias"."""
    layer, _, part = name.removeprefix(PREFIX).rpartition(".")
    if not layer.startswith("h."):
        return f"{NAMES[layer]}.{part}"
    _, number, layer = layer.split(".", 2)
    return f"blk.{number}.{NAMES[layer]}.{part}"
