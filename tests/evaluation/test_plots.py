"""Pictures: the Pareto front, and SVG that holds what was given."""

from __future__ import annotations

import importlib.util
import math
import xml.etree.ElementTree as ET

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.evaluation.plots import draw_layers, draw_pareto, pareto_front, require_matplotlib

pytest.importorskip("matplotlib")


def test_the_front_holds_what_nothing_beats():
    points = [(3.25, 0.3), (2.25, 1.0), (3.25, 0.2), (4.25, 0.25), (4.5, 0.05), (2.25, 1.0), (2.0, 3.0)]
    front = pareto_front(points)
    assert [points[i] for i in front] == [(2.0, 3.0), (2.25, 1.0), (3.25, 0.2), (4.5, 0.05)]
    for index, (bits, error) in enumerate(points):
        beaten = any(b <= bits and e <= error and (b, e) != (bits, error) for b, e in points)
        assert beaten or index in front or points[index] in [points[i] for i in front]


def test_a_pareto_picture_names_every_point_off_the_baseline():
    points = {"f16": (16.0, 0.0, 0.0), "iso3": (3.25, 0.9, 0.01), "rq3 <best>": (3.5, 0.1, math.nan)}
    picture = draw_pareto(points, 8192)
    assert ET.fromstring(picture).tag.endswith("svg") and draw_pareto(points, 8192) == picture
    assert picture != draw_pareto(points | {"iso3": (3.25, 0.2, 0.01)}, 8192)
    assert draw_pareto({"f16": points["f16"]}, 8192) is None


def test_a_layer_picture_shows_three_heat_maps():
    error = {"both": 0.3, "k": 0.2, "v": 0.1}
    rows = {"iso3": [error] * 30, "f16": [dict.fromkeys(error, 0.0)] * 30}
    picture = draw_layers(rows)
    assert ET.fromstring(picture).tag.endswith("svg") and picture.count(b"<image") >= 3
    assert draw_layers({"f16": rows["f16"]}) is None


def test_without_matplotlib_the_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rotquant-tvm\[plots\]"):
        require_matplotlib()
