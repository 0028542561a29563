"""Rank images by one person's taste.

python examples/score_images.py my-taste "a red apple" first.png second.png third.png

`my-taste` is what `train_reward.py` saved, or the Hub id of a reward or of any CLIP. `bt-hf score` does the same and
reads whole folders.
"""

import sys

from bt_hf import PreferenceScorer


def main(argv: list[str]) -> None:
    if len(argv) < 4:
        sys.exit(f"usage: score_images.py REWARD PROMPT IMAGE IMAGE ...\n{__doc__}")
    reward, prompt, *images = argv

    # 1. Load the adapter on top of the base that it names. A folder or a Hub id; a GPU is used if there is one.
    scorer = PreferenceScorer.from_pretrained(reward)

    # 2. Rank: the images of a prompt, best first.
    ranking = scorer.rank(prompt, images)
    for index, value in ranking:
        print(f"{value:8.3f}  {images[index]}")

    # 3. Compare: a difference of rewards is a probability, which one reward alone is not.
    (best, _), (second, _) = ranking[:2]
    probability = scorer.compare(prompt, images[best], images[second])
    print(f"{images[best]} is preferred to {images[second]} with probability {probability:.2f}.")

    # 4. The same images for other words: what would this person call the best one?
    labels = [prompt, "something else"]
    for label, share in zip(labels, scorer.classify([images[best]], labels)[0].tolist(), strict=True):
        print(f"{share:8.2f}  {label}")


if __name__ == "__main__":
    main(sys.argv[1:])
