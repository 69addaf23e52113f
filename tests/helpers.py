"What several test files use."
import pytest, torch
from rcic_fastai.core import ScreenError


def refused(f, *words):
    "Call `f`, which must raise a `ScreenError`: one short sentence with these words; return it"
    with pytest.raises(ScreenError) as e: f()
    text = str(e.value)
    for w in words: assert w in text, text
    assert '\n' not in text and text.endswith('.') and len(text) < 1500, text
    return text


def learner(dls, make=None, **kwargs):
    "Return a small learner without a progress bar"
    from rcic_fastai.train.learner import screen_learner
    learn = (make or screen_learner)(dls, 'mobilenetv3_small_050', pretrained=None, emb_dim=16, **kwargs)
    return learn.remove_cb(learn.progress) or learn


def quiet(learn, f):
    "Call `f` without the table of the epochs"
    with learn.no_logging(): return f()


def same(a, b):
    "Return whether two dicts hold the same tensors"
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
