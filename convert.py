"""Convert the weights of other programs into a checkpoint, from which sample.py and train.py can
start, and a checkpoint into a folder that Hugging Face's transformers can load.

    python convert.py --source=gpt2                       # OpenAI's weights, from Hugging Face
    python convert.py --source=FOLDER --out_dir=out/mine  # a GPT-2 that transformers has saved
    python convert.py --source=out/ckpt.pt --dataset=shakespeare_char    # nanoGPT's checkpoint
    python convert.py --source=out/stdlib --to=huggingface               # writes for transformers
    python convert.py --source=gpt2 --to=gguf             # writes for llama.cpp; gguf-f16: half
    python convert.py --source=out/stdlib --to=int8       # a checkpoint of a quarter of the size
    python convert.py --source=gpt2 --adapter=FOLDER      # with a LoRA adapter of PEFT's merged in

The tokenizer is the folder's tokenizer.json, or GPT-2's where there is none. That of a ckpt.pt is
its dataset's: the tokenizer.json that prepare.py wrote, or the characters in nanoGPT's meta.pkl.
Writes model.safetensors, tokenizer.json and meta.json, and prints the command that samples; for
transformers config.json, generation_config.json and tokenizer_config.json too. A model with the
switches that came after GPT-2 is written with the code that computes it (exchange/own_code.py).
"""

from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError, check_settings, run
from exchange.gguf import check_gguf, save_gguf
from exchange.huggingface import SIZES, VOCAB_SIZE, beyond_gpt2, load_gpt2, save_gpt2
from exchange.nanogpt import find_nanogpt, load_nanogpt, read_characters
from exchange.own_code import has_own_code, load_with_code, save_with_code
from formats.checkpoint import open_checkpoint, refuse_quantized
from formats.dataset import dataset_folder
from formats.files import write_json
from formats.weights import save_weights
from posttraining.adapter import load_adapter
from posttraining.lora import merge
from runtime.quantized import KINDS, quantize
from text.bpe import read_spec
from text.chat import TEMPLATE
from text.tokenizer import Tokenizer, gpt2_spec
from text.tokenizer_json import GPT2_PATTERN, hugging_face_from_spec, tokenizer_config

FORMATS = ("flatgpt", *KINDS, "huggingface", "gguf", "gguf-f16")
PADDED_VOCABULARY = 50304  # of nanoGPT where the dataset has no meta.pkl, whatever its tokens are


def main(
    source="gpt2",  # gpt2, ..., gpt2-xl; the folder of a saved GPT-2 or of a run; or a ckpt.pt
    dataset="",  # of a ckpt.pt: the dataset it was trained on; '': the one that it names
    mlp="gelu_exact",  # of a ckpt.pt: its activation; gelu if nanoGPT was older than June 2023
    adapter="",  # a LoRA adapter of the source, in PEFT's layout, to be merged into its weights
    to="flatgpt",  # flatgpt: a checkpoint; int8: one only to use; huggingface; gguf, gguf-f16
    out_dir="",  # the folder to write; '': out/<source>, or out/<source>-huggingface, ...
):
    check_settings(locals(), {"to": FORMATS})

    # Where to write: never over the source.
    nanogpt = find_nanogpt(source)
    source_folder = Path(source)
    if nanogpt:
        source_folder = nanogpt.parent
    folder = Path(out_dir)
    if not out_dir:
        folder = Path("out", source_folder.resolve().name)
        if to != "flatgpt":
            folder = folder.with_name(f"{folder.name}-{to}")
    if source not in SIZES and folder.resolve() == source_folder.resolve():
        raise UserError(f"out_dir={out_dir!r} is the source, which would be overwritten; name "
                        "another folder")

    # Read everything before anything is written.
    if nanogpt:
        model, named = load_nanogpt(nanogpt, mlp)
        tokenizer = nanogpt_tokenizer(nanogpt, model.config.vocab_size, dataset, named)
    elif source_folder.is_dir() and not (source_folder / "config.json").is_file():
        checkpoint = open_checkpoint(source, "best")
        refuse_quantized(checkpoint, "converted")
        model, tokenizer = checkpoint.load_model(), Tokenizer.load(checkpoint.folder)
    else:
        read = load_gpt2
        if has_own_code(source):
            read = load_with_code
        model = read(source)
        tokenizer = folder_tokenizer(source, model.config.vocab_size)
    if adapter:
        load_adapter(model, Path(adapter))
        merge(model)

    # Write it, and say what to do with it.
    parameters = model.parameter_count()
    try:
        if to == "huggingface":
            then = write_for_transformers(model, tokenizer, folder)
        elif to in ("gguf", "gguf-f16"):
            then = write_gguf(model, tokenizer, folder, to)
        else:
            facts = {"source": source}
            if to in KINDS:
                quantize(model)
                facts["quantized"] = to
            write_checkpoint(model, tokenizer, facts, folder)
            then = f"sample from it with python sample.py --init_from={folder}"
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); make room there, or "
                        "choose another --out_dir=") from error
    print(f"{folder}: {parameters:,} parameters; {then}")


def write_checkpoint(model, tokenizer, facts, folder):
    """Write a checkpoint. facts: of meta.json, which comes last, because without it nothing can be
    loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder)
    tokenizer.save(folder)
    write_json(folder / "meta.json", {"model": asdict(model.config), **facts})


def write_for_transformers(model, tokenizer, folder):
    """Write a folder for transformers; return how to load it there."""
    config, end = tokenizer_config(tokenizer.eot, model.config.block_size), tokenizer.eot
    # A model that was trained on conversations ends its answers.
    if "<|end|>" in tokenizer.special:
        config |= {"eos_token": "<|end|>", "chat_template": TEMPLATE}
        end = tokenizer.special["<|end|>"]
    # A GPT-2 by transformers' own class, any other with our code beside it.
    then = f"load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}"
    if beyond_gpt2(model.config):
        save_with_code(model, tokenizer.vocab_size, end, folder)
        then += ", trust_remote_code=True"
    else:
        save_gpt2(model, tokenizer.vocab_size, end, folder)
    write_json(folder / "tokenizer.json", hugging_face_from_spec(tokenizer.spec))
    write_json(folder / "tokenizer_config.json", config)
    return then + ")"


def write_gguf(model, tokenizer, folder, to):
    """Write a folder with one file for llama.cpp; return how to use it there. Raises UserError for
    a model or a tokenizer that it does not have."""
    contents = hugging_face_from_spec(tokenizer.spec)
    check_gguf(model.config, tokenizer.kind, contents)
    # A model that was trained on conversations ends its answers.
    end, template = tokenizer.eot, None
    if "<|end|>" in tokenizer.special:
        end, template = tokenizer.special["<|end|>"], TEMPLATE
    dtype = torch.float32
    if to == "gguf-f16":
        dtype = torch.float16
    folder.mkdir(parents=True, exist_ok=True)
    save_gguf(model, contents, end, template, folder / "model.gguf", dtype)
    return f"run it with llama-cli -m {folder / 'model.gguf'}"


def folder_tokenizer(source, vocab_size):
    """Return the Tokenizer of a folder that transformers has saved; GPT-2's where it has none.
    Raises UserError where it cannot be used, or has more tokens than the model."""
    # The folder's own. If it is GPT-2's it is called so, as datasets do that are prepared with it.
    path = Path(source, "tokenizer.json")
    if source not in SIZES and path.is_file():
        spec = read_spec(path)
        if spec.get("pattern") == GPT2_PATTERN and len(spec["tokens"]) == VOCAB_SIZE - 1:
            gpt2 = gpt2_spec()
            if spec["tokens"] == gpt2["tokens"]:
                spec = {**gpt2, "special_tokens": spec["special_tokens"]}
        tokenizer = Tokenizer(spec)
    else:
        path = "GPT-2's tokenizer"
        tokenizer = Tokenizer(gpt2_spec())

    # Padded vocabularies are larger, which does no harm.
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size:,} tokens, and the model in {source} has "
                        f"{vocab_size:,}; put the model's own tokenizer.json into its folder")
    return tokenizer


def nanogpt_tokenizer(path, vocab_size, dataset, named):
    """Return the Tokenizer of nanoGPT's checkpoint at `path`.

    dataset: what the user said; named: the dataset that the checkpoint names. Raises UserError
    where neither has a tokenizer of this vocabulary.
    """
    # GPT-2's tokens, padded or not, unless the user knows better.
    if not dataset and vocab_size in (VOCAB_SIZE, PADDED_VOCABULARY):
        return Tokenizer(gpt2_spec())

    # Look for the dataset: where the user says, or in nanoGPT's data/ beside the checkpoint's
    # folder, or in ours.
    folders = [dataset_folder(dataset or named or "NAME")]
    if not dataset:
        folders.insert(0, path.resolve().parent.parent / "data" / named)
    remedy = f"python convert.py --source={path} --dataset=NAME, a prepared dataset's or a path"
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.load(folder)
        elif (folder / "meta.pkl").is_file():
            tokenizer = Tokenizer(read_characters(folder / "meta.pkl"))
        else:
            continue
        is_padded = tokenizer.vocab_size < vocab_size == PADDED_VOCABULARY
        if tokenizer.vocab_size != vocab_size and not is_padded:
            raise UserError(f"{folder} has {tokenizer.vocab_size:,} tokens, {path} was trained "
                            f"with {vocab_size:,}; name its dataset: {remedy}")
        return tokenizer
    raise UserError(f"{folders[-1]}: neither tokenizer.json nor meta.pkl here, so the tokenizer "
                    f"of {path} ({vocab_size:,} tokens) is not known; name its dataset: {remedy}")


if __name__ == "__main__":
    run(main)
