"""Labels of a batch on another device."""

import torch

from smartkv.labels.key_labels import Labels

META = torch.device("meta")


def test_all_tensors_move_and_the_ages_stay() -> None:
    labels = Labels(torch.rand(3, 5), torch.rand(2, 3, 5), (16, 64)).to(META)
    assert labels.log4_lifespan.device == labels.future_attention.device == META
    assert (labels.log4_lifespan.shape, labels.future_attention.shape, labels.ages) == ((3, 5), (2, 3, 5), (16, 64))


def test_labels_without_future_attention_move_too() -> None:
    labels = Labels(torch.rand(3, 5)).to(META)
    assert labels.log4_lifespan.device == META and labels.future_attention is None and labels.ages == ()
