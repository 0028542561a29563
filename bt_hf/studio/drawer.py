"""Draw candidates with a pipeline while the person clicks."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bt_hf.data.images import one_line
from bt_hf.studio.errors import NotSavedError
from bt_hf.studio.pool import DRAWN, Pool

logger = logging.getLogger(__name__)

CANDIDATES = 6  # images of a prompt
_FIRST = 2  # drawn of every prompt before any gets more
_PAUSE = 1.0


class Drawer:
    """Background drawing of images into the pool.

    Args:
        pool: Gets the images; those of an earlier run are not drawn again.
        prompts: What to draw.
        pipeline: Hub id or folder of a pipeline.
        options: For the pipeline's call.
        busy: True while drawing should wait, as another piece of work needs the machine.

    Attributes:
        problem: Reason that nothing more is drawn; `None` if all is well.
    """

    def __init__(
        self,
        pool: Pool,
        prompts: Sequence[str],
        pipeline: str,
        options: Mapping[str, Any] | None = None,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.pool, self.prompts, self.pipeline = pool, list(prompts), pipeline
        self.options, self.busy = dict(options or {}), busy
        self.problem: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def stop(self) -> None:
        """End after the picture that is being drawn."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    @property
    def drawing(self) -> bool:
        """True while there is more to draw."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._draw()
        except Exception as error:
            logger.warning("the studio has stopped drawing: %s", one_line(error))
            self.problem = f"no more pictures are drawn: {one_line(error)}"

    def _draw(self) -> None:
        left = self._left()
        if not left:
            return
        import torch

        from bt_hf.diffusion.generation.candidates import draw, image_seed
        from bt_hf.diffusion.origin import from_pretrained

        pipeline = from_pretrained(self.pipeline)
        pipeline = pipeline.to("cuda") if torch.cuda.is_available() else pipeline
        pipeline.set_progress_bar_config(disable=True)
        for place, index in left:
            while self.busy() and not self._stopped.is_set():
                self._stopped.wait(_PAUSE)
            if self._stopped.is_set():
                return
            prompt = self.prompts[place]
            (drawn,) = draw(pipeline, [prompt], [image_seed(0, place, index)], 1, **self.options)
            if drawn.image is None:
                self.pool.skipped[_name(place, index)] = f"a drawing that is {drawn.problem}"
                continue
            try:
                self.pool.add(drawn.image, _name(place, index), prompt, DRAWN)
            except NotSavedError as error:
                raise OSError(error.errno, f"there is no room for more ({error.strerror})") from error

    def _left(self) -> list[tuple[int, int]]:
        """Return place of the prompt and number of each image to draw: two of each prompt first."""
        drawn = {picture.name for picture in self.pool.pictures if picture.origin == DRAWN}
        places = range(len(self.prompts))
        order = [(place, index) for place in places for index in range(_FIRST)]
        order += [(place, index) for index in range(_FIRST, CANDIDATES) for place in places]
        return [one for one in order if _name(*one) not in drawn]


def _name(place: int, index: int) -> str:
    return f"drawing {index + 1} of prompt {place + 1}"
