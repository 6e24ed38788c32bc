"""TRL's GRPOTrainer in a race of `tools.bench_rl`, which starts it: transformers and torch on the CPU.

    /path/to/venv/bin/python -m tools.rl_peer_trl --race race.json --record trl.jsonl

The environment needs ``pip install torch trl``, not qwq_jax. Settings: Dr.GRPO's loss (``loss_type="dr_grpo"``,
``scale_rewards="none"``), no KL and so no reference model, one update a batch, float32, no recomputation of
activations, one ``generate`` for all completions of a step with the default cache.
"""

# pyright: reportMissingImports=false

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tools.rl_race import Question, Race, Record, check_prompts, peer_arguments

PACKAGES = ("trl", "transformers", "torch", "accelerate")


def settings(race: Race, folder: str, micro_batch: int, device: str) -> GRPOConfig:
    """The race in TRL's words."""
    descent = race.descent
    return GRPOConfig(
        output_dir=folder,
        use_cpu=device == "cpu",
        bf16=False,
        seed=race.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=race.samples_per_step // micro_batch,
        generation_batch_size=race.samples_per_step,
        num_generations=race.group_size,
        max_completion_length=race.max_tokens,
        temperature=race.temperature,
        num_iterations=1,
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        epsilon=race.clip_low,
        epsilon_high=race.clip_high,
        max_steps=descent.steps,
        learning_rate=descent.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": descent.final_lr_ratio},
        warmup_steps=descent.warmup_steps,
        adam_beta1=descent.b1,
        adam_beta2=descent.b2,
        adam_epsilon=descent.eps,
        weight_decay=descent.weight_decay,
        max_grad_norm=descent.clip_norm,
    )


def answers(model: Any, tokenizer: Any, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """Greedy completions of all questions in one batch."""
    width = max(len(question.token_ids) for question in questions)
    padding = [width - len(question.token_ids) for question in questions]
    pairs = list(zip(padding, questions, strict=True))
    padded = [[tokenizer.pad_token_id] * pad + question.token_ids for pad, question in pairs]
    ids = torch.tensor(padded, device=model.device)
    mask = torch.tensor([[0] * pad + [1] * len(question.token_ids) for pad, question in pairs], device=model.device)
    model.eval()
    with torch.no_grad():
        drawn = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens)
    model.train()
    return tokenizer.batch_decode(drawn[:, width:], skip_special_tokens=True)


class Watch(transformers.TrainerCallback):
    """Tells the record where steps end."""

    def __init__(self, race: Race, record: Record, tokenizer: Any) -> None:
        self._race = race
        self._record = record
        self._tokenizer = tokenizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Evaluates before the first step."""
        self._record.start(lambda: self._answers(given["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called when the optimizer has made its step."""
        self._record.end_step(lambda: self._answers(given["model"]))
        # Its schedule is made for `max_steps`, which may be more than the race has.
        control.should_training_stop = state.global_step >= self._race.last_step

    def _answers(self, model: Any) -> list[str]:
        return answers(model, self._tokenizer, self._race.held_out, self._race.max_tokens)


def main() -> None:
    """Trains until the last step, or until it is stopped."""
    options = peer_arguments(__doc__, micro_batch=64)
    race = Race.read(options.race)
    torch.set_num_threads(race.threads)
    transformers.logging.set_verbosity_error()
    record = Record(race, options.record, PACKAGES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(race.model)
    asked = [*race.prompts, *race.held_out]
    messages = [question.messages for question in asked]
    check_prompts(asked, tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    def reward(completions: Any, completion_ids: Any, answer: Any, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return record.draw(texts, answer, [len(ids) for ids in completion_ids])

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(race.model, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=reward,
            args=settings(race, folder, options.micro_batch, options.device),
            train_dataset=Dataset.from_list([{"prompt": q.messages, "answer": q.answer} for q in race.prompts]),
            callbacks=[Watch(race, record, tokenizer)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
