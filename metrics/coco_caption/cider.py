"""CIDEr-D: the CIDEr of the COCO evaluation code, and the reward of self-critical training.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015), section 5. What the COCO code calls
CIDEr is CIDEr-D with sigma 6, here too. Two quirks of that code are kept, for equal values: the "length" in its
Gaussian penalty is the number of bigrams, and an n-gram that no reference has gets document frequency 1.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .ngrams import encode, find, ngram_counts, words

END_OF_SEQUENCE = "<eos>"
_ORDERS = 4
_SIGMA = 6.0
_FORMAT = 1  # of the cache file


class CiderD:
    """CIDEr-D with the document frequencies of a fixed corpus of references.

    Evaluation takes the frequencies from the evaluated references; a reward takes them from the training corpus, once:

    >>> reward = CiderD.cached(training_references, "cache", end_of_sequence=True)  # doctest: +SKIP
    >>> reward.score(hypotheses, references)  # 5 candidates of 64 images: (320,)   # doctest: +SKIP

    With `end_of_sequence`, every caption ends in one more word, in hypotheses, references and frequencies. Without it,
    self-critical training learns to stop early ("a man with a"): nothing rewards a finished sentence.
    """

    def __init__(
        self,
        vocabulary: list[str],
        keys: list[np.ndarray],
        frequencies: list[np.ndarray],
        images: int,
        end_of_sequence: bool,
    ):
        # n-gram j of order n is keys[n - 1][j] = (number of its first n - 1 words) * len(vocabulary) + (last word);
        # keys are sorted and j is its number. For order 1, the number is the word's place in the vocabulary.
        self.vocabulary = {word: number for number, word in enumerate(vocabulary)}
        self.keys = keys
        self.frequencies = frequencies
        self.images = images
        self.end_of_sequence = end_of_sequence

    @classmethod
    def from_references(cls, references: Sequence[Sequence[list[str]]], end_of_sequence: bool = False) -> "CiderD":
        """Document frequencies of tokenized references, `references[i]` being the captions of image i."""
        if not references:
            raise ValueError("CIDEr needs the references of at least one image to count document frequencies.")
        scorer = cls([], [], [], len(references), end_of_sequence)
        captions = scorer._words(caption for image in references for caption in image)
        image_of = np.repeat(np.arange(len(references)), [len(image) for image in references])
        ids, lengths, scorer.vocabulary = encode(captions, scorer.vocabulary)
        size = len(scorer.vocabulary)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        end = np.repeat(np.cumsum(lengths), lengths)
        start, gram = np.arange(len(ids)), ids
        for order in range(1, _ORDERS + 1):
            if order == 1:
                keys = np.arange(size)
            else:
                longer = start + order <= end[start]
                start, gram = start[longer], gram[longer]
                keys, gram = np.unique(gram * size + ids[start + order - 1], return_inverse=True)
            once_an_image = np.unique(image_of[owner[start]] * max(len(keys), 1) + gram)
            scorer.keys.append(keys)
            scorer.frequencies.append(np.bincount(once_an_image % max(len(keys), 1), minlength=len(keys)))
        return scorer

    @classmethod
    def cached(
        cls, references: Sequence[Sequence[list[str]]], folder: str | os.PathLike, end_of_sequence: bool = False
    ) -> "CiderD":
        """Like `from_references`, kept in `folder` under a name derived from the references' content.

        Safe with several processes: the file appears complete or not at all. A damaged file is rebuilt.
        """
        digest = hashlib.sha256(f"{_FORMAT} {end_of_sequence}".encode())
        for image in references:
            digest.update("\n".join(" ".join(caption) for caption in image).encode() + b"\n\n")
        path = Path(folder) / f"cider-{digest.hexdigest()[:24]}.npz"
        if path.exists():
            try:
                return cls.load(path)
            except (OSError, ValueError, KeyError):
                pass
        scorer = cls.from_references(references, end_of_sequence)
        scorer.save(path)
        return scorer

    def save(self, path: str | os.PathLike) -> None:
        """Write the document frequencies to an .npz file (numbers and text only, no pickle), atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "vocabulary": np.frombuffer("\n".join(self.vocabulary).encode(), dtype=np.uint8),
            "facts": np.array([_FORMAT, self.images, self.end_of_sequence]),
        }
        for order in range(_ORDERS):
            arrays[f"keys{order + 1}"], arrays[f"frequencies{order + 1}"] = self.keys[order], self.frequencies[order]
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            np.savez(f"{folder}/{path.stem}.npz", **arrays)
            os.replace(f"{folder}/{path.stem}.npz", path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CiderD":
        """Read what `save` wrote. ValueError where the file is something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                file_format, images, end_of_sequence = arrays["facts"].tolist()
                if file_format != _FORMAT:
                    raise ValueError(f"format {file_format}, expected {_FORMAT}")
                vocabulary = arrays["vocabulary"].tobytes().decode()
                keys = [arrays[f"keys{order}"] for order in range(1, _ORDERS + 1)]
                frequencies = [arrays[f"frequencies{order}"] for order in range(1, _ORDERS + 1)]
        except FileNotFoundError:
            raise
        except Exception as error:  # a truncated file raises whatever zip, zlib or numpy raise
            raise ValueError(f"{path} does not hold CIDEr document frequencies ({error}); delete it.") from error
        return cls(vocabulary.split("\n") if vocabulary else [], keys, frequencies, images, bool(end_of_sequence))

    def score(
        self,
        hypotheses: Sequence[list[str]],
        references: Sequence[Sequence[list[str]]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """CIDEr-D of each hypothesis, 10 at most: (hypotheses,).

        Args:
            hypotheses: tokens of each caption; k candidates per image, grouped, in the images' order.
            references: tokens of each image's reference captions, (images); len(hypotheses) is k * images.
            ended: with `end_of_sequence`, whether each hypothesis has that token: one that was cut at the maximum
                length does not. Default: all do.
        """
        images = len(references)
        if not images or len(hypotheses) % images:
            raise ValueError(f"{len(hypotheses)} hypotheses cannot be divided evenly among {images} images.")
        counts = np.array([len(captions) for captions in references])
        if not counts.all():
            raise ValueError(f"image {int(np.argmin(counts))} of the batch has no reference captions.")
        candidates = len(hypotheses) // images
        captions = self._words(hypotheses, ended) + self._words(caption for image in references for caption in image)
        ids, lengths, vocabulary = encode(captions, self.vocabulary)  # new words are for this call only

        # A pair is one hypothesis and one reference of its image. References are stored image by image, so a
        # hypothesis's pairs follow each other.
        first_reference = len(hypotheses) + np.cumsum(counts) - counts
        image_of_hypothesis = np.repeat(np.arange(images), candidates)
        pairs_of_hypothesis = counts[image_of_hypothesis]
        hypothesis_of_pair = np.repeat(np.arange(len(hypotheses)), pairs_of_hypothesis)
        first_pair = np.cumsum(pairs_of_hypothesis) - pairs_of_hypothesis
        within = np.arange(len(hypothesis_of_pair)) - first_pair[hypothesis_of_pair]
        reference_of_pair = first_reference[image_of_hypothesis][hypothesis_of_pair] + within

        log_images = np.log(float(self.images))
        similarity = np.zeros(len(hypothesis_of_pair))
        numbers = self._numbers(ids, lengths)
        for order, (owner, gram, count, start) in enumerate(ngram_counts(ids, lengths, len(vocabulary), _ORDERS)):
            number = numbers[order][start]
            frequency = np.where(number >= 0, np.append(self.frequencies[order], 0)[number], 0)
            weight = count * (log_images - np.log(np.maximum(frequency, 1.0)))
            norm = np.sqrt(np.bincount(owner, weight**2, minlength=len(captions)))
            # The n-grams of each pair's reference, looked up in its hypothesis.
            first_entry = np.append(0, np.cumsum(np.bincount(owner, minlength=len(captions))))
            entries = first_entry[reference_of_pair + 1] - first_entry[reference_of_pair]
            pair = np.repeat(np.arange(len(entries)), entries)
            entry = np.arange(len(pair)) - np.repeat(np.cumsum(entries) - entries, entries)
            entry += first_entry[reference_of_pair][pair]
            grams = int(gram.max()) + 1 if len(gram) else 1
            hypothesis_entries = int(first_entry[len(hypotheses)])
            at = find(
                owner[:hypothesis_entries] * grams + gram[:hypothesis_entries],
                hypothesis_of_pair[pair] * grams + gram[entry],
                len(hypotheses) * grams,
            )
            shared = at >= 0
            pair, reference_weight = pair[shared], weight[entry[shared]]
            products = np.minimum(weight[at[shared]], reference_weight) * reference_weight
            dot = np.bincount(pair, products, minlength=len(entries))
            norms = norm[hypothesis_of_pair] * norm[reference_of_pair]
            similarity += np.divide(dot, norms, out=np.zeros(dot.shape), where=norms != 0)
        bigrams = np.maximum(lengths - 1, 0)
        difference = (bigrams[hypothesis_of_pair] - bigrams[reference_of_pair]).astype(float)
        similarity *= np.exp(-(difference**2) / (2 * _SIGMA**2))
        return 10.0 * np.bincount(hypothesis_of_pair, similarity) / _ORDERS / pairs_of_hypothesis

    def _words(self, captions, ended=None) -> list[list[str]]:
        split = words(captions)
        if not self.end_of_sequence:
            return split
        ended = [True] * len(split) if ended is None else ended
        return [[*caption, END_OF_SEQUENCE] if end else caption for caption, end in zip(split, ended, strict=True)]

    def _numbers(self, ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """For each order, the corpus's number of the n-gram that begins at each position; -1 where it has none."""
        size = len(self.keys[0])
        end = np.repeat(np.cumsum(lengths), lengths)
        number = np.where(ids < size, ids, -1)
        numbers = [number]
        for order in range(2, _ORDERS + 1):
            start = np.flatnonzero(np.arange(len(ids)) + order <= end)
            last = ids[start + order - 1]
            start = start[(number[start] >= 0) & (last < size)]
            longer = np.full(len(ids), -1)
            longer[start] = find(self.keys[order - 1], number[start] * size + ids[start + order - 1])
            number = longer
            numbers.append(number)
        return numbers
