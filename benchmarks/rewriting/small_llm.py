"""A small language model trained on (prompt, text) pairs in minutes on a CPU, for the rewriting benchmarks.

It learns the form of its task but does not write good text: the published systems use models of 7 billion parameters.
"""

import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The user's message, unchanged: lets a chat server take plain prompts.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def train(pairs: list[tuple[str, str]], folder: Path, *, steps: int, batch_size: int = 32, vocabulary: int = 2000,
          hidden: int = 128, layers: int = 3, learning_rate: float = 3e-3, seed: int = 0) -> dict:  # fmt: skip
    """Train and save to `folder`; returns seconds, parameters and the last loss. The prompt is masked in the loss."""
    start = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    encoded = [([0, *tokenizer(prompt).input_ids], [*tokenizer(f" {text}").input_ids, 1]) for prompt, text in pairs]
    encoded = [pair for pair in encoded if len(pair[0]) + len(pair[1]) <= 400]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        if step % 20 == 0:  # rows of similar length together
            pool = sorted(rng.choices(encoded, k=20 * batch_size), key=lambda pair: len(pair[0]) + len(pair[1]))
            batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            rng.shuffle(batches)
        batch = batches[step % 20]
        width = max(len(prompt) + len(text) for prompt, text in batch)
        ids, labels = torch.ones(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        for row, (prompt, text) in enumerate(batch):
            ids[row, : len(prompt) + len(text)] = torch.tensor(prompt + text)
            labels[row, len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
        loss = model(input_ids=ids, attention_mask=(torch.arange(width) < (labels != -100).int().argmax(1, keepdim=True) +
                     (labels != -100).sum(1, keepdim=True)).long(), labels=labels).loss  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"small llm: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": time.perf_counter() - start, "parameters": parameters, "loss": loss.item(), "steps": steps}
