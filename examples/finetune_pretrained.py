"""Fine-tune a converted transformers model with Trainer: packed sequences, bf16, checkpointing.

Needs `pip install 'smartbird[hf]' accelerate`. Without arguments it trains a small random Llama on
made-up sequences for a few seconds:

    python examples/finetune_pretrained.py
    python examples/finetune_pretrained.py --model PATH_OR_NAME --text FILE... --out FOLDER
"""

import argparse
import inspect
import math
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import smartbird.hf

TOKENS, CHOICES = 64, 2
Sequences = list[dict[str, list[int]]]


def small_model() -> PreTrainedModel:
    """Random, and its tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def made_up(count: int, length: int) -> list[list[int]]:
    """Sequences of many lengths. A token may be followed by two others, so perplexity can be 2."""
    followers = torch.randint(TOKENS, (TOKENS, CHOICES)).tolist()
    documents = []
    for size in torch.randint(length // 4, length + 1, (count,)).tolist():
        tokens = [0]
        for choice in torch.randint(CHOICES, (size - 1,)).tolist():
            tokens.append(followers[tokens[-1]][choice])
        documents.append(tokens)
    return documents


def sequences(documents: list[list[int]], length: int) -> tuple[Sequences, Sequences]:
    """Pieces of at most `length` tokens, to train with and, each eighth, to measure with."""
    pieces = [
        {"input_ids": document[start : start + length]}
        for document in documents
        for start in range(0, len(document), length)
    ]
    held_out = pieces[::8]
    del pieces[::8]
    return pieces, held_out


def arguments(folder: str, options: argparse.Namespace) -> TrainingArguments:
    # transformers 5 renamed it on its way.
    known = inspect.signature(TrainingArguments).parameters
    name = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if x in known)
    checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        **checkpointing,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.lr,
        max_steps=options.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a converted model with Trainer.")
    parser.add_argument("--model", help="a path or a name; needs --text (default: a random one)")
    parser.add_argument("--text", type=Path, nargs="+", help="files, each of them a document")
    parser.add_argument("--out", type=Path, help="where the trained model and its sketches go")
    parser.add_argument("--keys", type=int, default=48, help="K, keys that a query attends to")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, at most")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a pack")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate")
    options = parser.parse_args()
    if options.model and not options.text:
        parser.error("--model needs --text")

    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        documents = [tokenizer(file.read_text())["input_ids"] for file in options.text]
    else:
        model = small_model()
        documents = [list(file.read_bytes()) for file in options.text or ()]
    training, held_out = sequences(documents or made_up(400, options.length), options.length)

    passage = max(training, key=lambda sequence: len(sequence["input_ids"]))
    smartbird.hf.convert(
        model, num_samples=options.keys, calibration=torch.tensor([passage["input_ids"]])
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=arguments(folder, options),
            train_dataset=training,
            eval_dataset=held_out,
            data_collator=DataCollatorWithFlattening(),
        )
        before = math.exp(trainer.evaluate()["eval_loss"])
        trainer.train()
    after = math.exp(trainer.evaluate()["eval_loss"])
    with smartbird.hf.dense(model):
        dense = math.exp(trainer.evaluate()["eval_loss"])
    print(f"perplexity before {before:.2f}, after {after:.2f}, with dense attention {dense:.2f}")

    if options.out:
        model.save_pretrained(options.out)
        print(
            f"wrote {options.out}: from_pretrained reads the model, smartbird.hf.load its sketches"
        )


if __name__ == "__main__":
    main()
