"""Train what was clicked: a reward, and a LoRA with which a pipeline draws."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback

from bt_hf.data.atomic import write_file
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.cross_validation import cross_validate
from bt_hf.reward.trainer import BradleyTerryTrainer
from bt_hf.reward.verdict import number_pairs
from bt_hf.studio.jobs import Handle
from bt_hf.studio.pool import BLIND, Pool
from bt_hf.studio.questions import Questions
from bt_hf.studio.session import Session

REWARD, LORA, DRAWING = "reward", "lora", "drawing.json"
# Options of a training that go without saying here.
_QUIET: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "no",
    "overwrite_output_dir": True,
    "disable_tqdm": True,
}
_SHOWN, _BLIND = 4, 12  # prompts that are drawn before and after, and to be compared blind
_FOLDS = 5


@dataclass(frozen=True)
class Drawing:
    """Pipeline that is trained, and what it draws to be looked at.

    Attributes:
        pipeline: Hub id or folder.
        shown: Prompts that are drawn before and after; default: some that were clicked on.
        unseen: Prompts for the blind comparison; default: some of the session's that were not clicked on.
        options: Further options of `PreferenceLoRAConfig`.
    """

    pipeline: str
    shown: Sequence[str] = ()
    unseen: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workshop:
    """Works of `Jobs` that train.

    Args:
        session, pool, questions: The parts of the studio.
        base: Hub id or folder of the base of the reward.
        drawing: The pipeline; `None` without one.
    """

    session: Session
    pool: Pool
    questions: Questions
    base: str
    drawing: Drawing | None

    def pairs(self) -> Dataset:
        """Return the pairs of the session.

        Raises:
            ValueError: There is none.
        """
        return load_preference_pairs(str(self.session.folder), on_bad_rows="drop")

    def train_reward(self, handle: Handle, options: Mapping[str, Any]) -> dict[str, Any]:
        """Cross-validate, train a reward on all clicks, and save it into the session."""
        pairs = self.pairs()
        config = BradleyTerryConfig(str(self.session.folder / REWARD), **_QUIET)
        verdict = None
        if number_pairs(pairs).any():  # else there is one pair alone, and nothing to judge it by
            message = "Judging your clicks: each is predicted by a model that has not seen it"
            handle.say(message, 0.05)
            watching = [handle.callback_of_many(message, 0.05, 0.5, _FOLDS)]
            found = cross_validate(self.base, pairs, config, folds=_FOLDS, progress=False, callbacks=watching)
            verdict = found.verdict
        handle.say("Learning your taste", 0.5)
        trainer = BradleyTerryTrainer(self.base, config, train_dataset=pairs)
        trainer.verdict = verdict
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(handle.callback("Learning your taste", 0.5, 0.95))
        trainer.train()
        handle.say("Saving", 0.95)
        trainer.save_model()
        handle.job.message = verdict or "The reward is trained and saved."
        return {"folder": REWARD, "pairs": len(pairs), "verdict": verdict, "words": trainer.in_words()}

    def train_drawing(self, handle: Handle, options: Mapping[str, Any]) -> dict[str, Any]:
        """Train a preference LoRA, draw with and without it at the same seeds, and prepare the blind comparison."""
        from bt_hf.diffusion.config import PreferenceLoRAConfig  # diffusers, which a reward alone does without
        from bt_hf.diffusion.trainer import PreferenceLoRATrainer

        if self.drawing is None:
            raise ValueError("name a pipeline in --pipeline")
        handle.say("Loading the pipeline, and drawing with it as it is", 0.02)
        pairs = self.pairs()
        shown, unseen = self._prompts()
        given = {name: options[name] for name in ("max_steps", "learning_rate") if options.get(name) is not None}
        config = PreferenceLoRAConfig(
            str(self.session.folder / LORA),
            validation_prompts=[*shown, *unseen],
            **{"validation_images": 1, **_QUIET, **self.drawing.options, **given},
        )
        trainer = PreferenceLoRATrainer(self.drawing.pipeline, config, train_dataset=pairs)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(handle.callback("Learning to draw your way", 0.1, 0.9))
        trainer.train()
        handle.say("Saving, and looking at what it draws now", 0.95)
        trainer.save_model()
        result = self._keep_drawings(trainer.validation.before, trainer.validation.after, shown, unseen)
        handle.job.message = "The LoRA is trained and saved: look at its drawings, then compare them blind."
        return result

    def _prompts(self) -> tuple[list[str], list[str]]:
        """Return the prompts to show, and those to compare."""
        assert self.drawing is not None
        clicked = list(dict.fromkeys(click.asked.prompt for click in self.session.log.clicks))
        rest = [prompt for prompt in self.pool.by_prompt() if prompt not in clicked]
        shown = list(self.drawing.shown) or clicked[-_SHOWN:]
        unseen = [prompt for prompt in self.drawing.unseen or rest if prompt not in clicked and prompt not in shown]
        step = max(1, len(unseen) // _BLIND)
        # With one prompt for all images, other seeds of it are what is not seen.
        return shown[:_SHOWN], (unseen[::step] or clicked)[:_BLIND]

    def _keep_drawings(
        self, before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]], shown: list[str], unseen: list[str]
    ) -> dict[str, Any]:
        run = secrets.token_hex(4)
        prompts = [*shown, *unseen]
        numbers = [
            [self.pool.add(row[0], f"drawing {run}", prompt, BLIND) for row, prompt in zip(rows, prompts, strict=True)]
            for rows in (before, after)
        ]
        result = {
            "run": run,
            "prompts": shown,
            "before": numbers[0][: len(shown)],
            "after": numbers[1][: len(shown)],
        }
        for place in range(len(shown), len(prompts)):
            sides = (numbers[1][place], numbers[0][place])
            if before[place][0].tobytes() == after[place][0].tobytes():
                continue  # there is nothing to prefer
            adapted = secrets.choice(("left", "right"))
            left, right = sides if adapted == "left" else sides[::-1]
            self.questions.put(prompts[place], left, right, "blind", of=run, adapted=adapted)
        write_file(self.session.folder / DRAWING, json.dumps(result, ensure_ascii=False).encode())
        return result


def last_drawing(folder: Path) -> dict[str, Any] | None:
    """Return the last result of a training of the pipeline, `None` if there was none."""
    try:
        found = json.loads((folder / DRAWING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "run" in found else None
