"""Real text for the demo: the topics of Python's help system, which every CPython carries."""

import re
from pydoc_data import topics as pydoc_topics

import torch


def token_stream() -> tuple[torch.Tensor, int]:
    """All words and signs of the topics, one topic after another, as ids of one vocabulary.

    Returns:
        int64 ``[tokens]``, and the size of the vocabulary. Common words are as common as language has it, and what a
        topic speaks of changes with the topic.
    """
    words = [
        word
        for name in sorted(pydoc_topics.topics)
        for word in re.findall(r"\w+|[^\w\s]", pydoc_topics.topics[name].lower())
    ]
    vocabulary = {word: index for index, word in enumerate(sorted(set(words)))}
    return torch.tensor([vocabulary[word] for word in words]), len(vocabulary)


def batches(stream: torch.Tensor, num_steps: int, num_ranks: int, rank: int, tokens_per_rank: int) -> torch.Tensor:
    """This rank's batches, int64 ``[num_steps, tokens_per_rank]``.

    The run goes through the stream from its beginning to its end; in each step the ranks read on side by side.
    """
    per_step = num_ranks * tokens_per_rank
    last = max(0, len(stream) - per_step)
    starts = torch.linspace(0, last, num_steps).long() + rank * tokens_per_rank
    positions = (starts[:, None] + torch.arange(tokens_per_rank)) % len(stream)
    return stream[positions]
