"""Publication of a trainer's adapter on the Hub, at the end and at checkpoints."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from bt_hf.hub.contract import contract_files
from bt_hf.hub.push import full_name, publish, push_adapter
from bt_hf.training.saving import CARD_ARGUMENTS, SavingTrainer

logger = logging.getLogger(__name__)


class PublishingTrainer(SavingTrainer):
    """`Trainer` that publishes the folder contract through `push_adapter`, with all its checks."""

    # Hub id of the base, for a run whose base is a local folder.
    hub_base_model: str | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find out who publishes, so that a wrong token shows before the training; the first commit makes the repo."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            self.hub_model_id = full_name(name, token or self.args.hub_token)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save, and publish what a trainer writes for others in one commit; see `push_adapter`.

        Args:
            commit_message: Title of the commit.
            blocking: Whether to wait for it.
            token: Default `args.hub_token`, else the one that is logged in.
            revision: Branch; default `args.hub_revision`, else "main".
            private: Default `args.hub_private_repo`; a new repo is private unless it is `False`.
            kwargs: Further arguments of `push_adapter`, and of the card: `license`, `language`, `tags`,
                `dataset_tags`.

        Returns:
            The commit, or a future of it if `blocking=False`; `None` on processes that do not publish.

        Raises:
            OSError: The Hub can't be reached or refuses; see `push_adapter`. The folder is saved all the same.
            ValueError: A check failed.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{name: kwargs.pop(name) for name in CARD_ARGUMENTS & set(kwargs)})
        self._finish_current_push()
        job = self._pusher.submit(
            push_adapter,
            self.args.output_dir,
            self.hub_model_id,
            self.args.hub_private_repo if private is None else private,
            revision or self.args.hub_revision,
            token or self.args.hub_token,
            **{"base_model": self.hub_base_model, "commit_message": commit_message, **kwargs},
        )
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's adapter while the training goes on, as `args.hub_strategy` says.

        "all_checkpoints" keeps each adapter in a folder of the repo too. "checkpoint" is as "every_save": the state
        of the optimizer, which its folder would hold, is a pickle and stays on this machine.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Read now: the folder may be gone before they are sent.
        files = {name: path.read_bytes() for name, path in contract_files(checkpoint_folder).items()}
        also_in = Path(checkpoint_folder).name if self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS else None
        job = self._pusher.submit(self._publish_checkpoint, checkpoint_folder, self.state.global_step, files, also_in)
        running: list[Any] = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*running, job])

    def _publish_checkpoint(self, source: str, step: int, files: Mapping[str, bytes], also_in: str | None) -> None:
        try:
            publish(
                files,
                source,
                self.hub_model_id,
                self.args.hub_private_repo,
                self.args.hub_revision,
                self.args.hub_token,
                self.hub_base_model,
                commit_message=f"Training in progress, step {step}",
                also_in=also_in,
            )
        except (OSError, ValueError) as error:  # a training of hours does not end for want of a network
            logger.warning("The checkpoint of step %d was not published: %s", step, error)

    @cached_property
    def _pusher(self) -> ThreadPoolExecutor:
        # One thread: commits stay in order.
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
