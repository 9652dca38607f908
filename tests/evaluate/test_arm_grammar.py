"""The spelling of arms: what is read, the names that come out, what is refused and how."""

from __future__ import annotations

import re

import pytest

from engine.evaluate.arm_grammar import Arm, parse_arm_scales, parse_arms, trainings


def test_the_list_of_the_readme_is_read():
    arms = parse_arms("sft,sdft,stm:2.5,dft,psft:0.2,k3:0.02,sft@0.5,sdft+dft%3e-4,replay:0.2,self")
    assert arms == [
        Arm("sft"),
        Arm("sdft"),
        Arm("sft", "stm:2.5"),
        Arm("sft", "dft"),
        Arm("sft", "psft:0.2"),
        Arm("sft", "k3:0.02"),
        Arm("sft", scale=0.5),
        Arm("sdft", "dft", rate=3e-4),
        Arm("replay", share=0.2),
        Arm("self"),
    ]
    assert [arm.title for arm in arms] == [
        "SFT",
        "SDFT",
        "STM 2.5",
        "DFT",
        "PSFT 0.2",
        "k3 0.02",
        "SFT x0.5",
        "SDFT + DFT lr 0.0003",
        "replay 0.2",
        "self-output",
    ]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("sft+stm:2.50", "stm:2.5"),
        ("sdft+sft@1.0", "sdft"),
        ("sft@.5%1E-3", "sft@0.5%0.001"),
        ("replay:0.20+dft", "replay:0.2+dft"),
        ("sft%0.0003000001", "sft%0.0003000001"),  # not rounded to 0.0003
    ],
)
def test_every_arm_has_one_name_which_is_read_as_the_same_arm(typed, name):
    arm = Arm.parse(typed)
    assert arm.name == name and Arm.parse(arm.name) == arm


def test_directories_are_one_for_each_training_and_need_no_quoting():
    """Every method with every loss at two rates; sft and sdft keep their names."""
    ways = ["sft", "sdft", "self", "rft", "replay:0.2", "replay:0.25"]
    losses = ["", "+stm:2.5", "+stm:25", "+dft", "+psft:0.2", "+k3:0.02", "+eaft:2", "+eaft:0.5"]
    texts = [f"{way}{loss}{rate}" for way in ways for loss in losses for rate in ("", "%1e-05")]
    arms = parse_arms(",".join(texts))
    names = [arm.directory for arm in arms]
    assert len(set(names)) == len(arms) == 96
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)
    assert Arm("sft").directory == "sft" and Arm("sdft").directory == "sdft"
    assert Arm.parse("stm:2.5@0.5%3e-4").directory == "stm-2.5-lr0.0003"


def test_scales_share_one_training():
    arms = parse_arms("sft@0.5,sdft,sft,sft@0.25,sft@0.5%1e-3")
    assert [arm.name for arm in trainings(arms)] == ["sft", "sdft", "sft%0.001"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft,sdtf", "arm 'sdtf': 'sdtf' is no method and no loss; expected METHOD[+LOSS]"),
        ("sft+stm", "stm"),
        ("stm:-1", "-1"),
        ("sft+rft", "'rft' is no loss"),
        ("sft@0", "scale '0': expected a number above 0 and at most 10"),
        ("sft@nan", "scale 'nan'"),
        ("sft%3e-4@0.5", "rate '3e-4@0.5'"),
        ("sft%-1", "rate '-1'"),
        ("replay", "share '': expected a number above 0"),
        ("replay:2", "share '2'"),
        ("sdft:3", "sdft takes no value"),
        ("dft+stm:2", "'dft' is no method"),
        ("dft,sft+dft", "'sft+dft' and 'dft' are the same arm"),
        ("sft,,sdft", "'' is no method"),
        ("", "'' is no method"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text, said):
    with pytest.raises(ValueError) as error:
        parse_arms(text)
    assert said in str(error.value) and "expected" in str(error.value)


def test_scales_are_numbers_above_0_each_once():
    assert parse_arm_scales("0.25, 0.5,1") == [0.25, 0.5, 1.0]
    for text in ("0,1", "0.5,0.50", "half", "50"):
        with pytest.raises(ValueError, match="scale"):
            parse_arm_scales(text)
