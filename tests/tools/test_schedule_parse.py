"""The parser of compiler schedules, on a schedule small enough to count by hand."""

import pytest

from tools.schedule_parse import BUNDLES, UTILIZATION, Part, read_schedule

# Two jumps forward, one within a loop of three trips; two delay slots; a comment over two lines.
TEXT = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0 } /* Start region 1 */
   0x1 LB: > { %v1 = vld [vmem:[%s1] sm:$0xff] } /* Start region 2 :: Start region 3 */
   0x2   : > { %9 = sbr.rel (%p1) target bundleno = 7 (0x7), region = 5 }
   0x3   :  {}
   0x4   :  {} /* End region 3 */
   0x5   : > { %v2 = vadd.f32 %v1, %v1 } /* Start region 4
a comment that goes on */
   0x6   : > { %v3 = vadd.f32 %v2, %v1 } /* End region 4 */
   0x7 PF: > { %p2 = scmp.ge.s32.totalorder %s2, 3 /* loop exit test */ }
   0x8   :  { %8 = sbr.rel (!%p2) target bundleno = 1 (0x1), region = 2 }
   0x9   :  {}
   0xa   :  {} /* End region 2 */
   0xb   :  { %v4 = vst %v3 }
"""
ROWS = "== CAPACTIY:\nVALU, VLOAD\n 2 1\n== UTILIZATION:\n" + "0 0\n0 1\n0 0\n0 0\n0 0\n1 0\n2 0\n" + "0 0\n" * 5


@pytest.fixture
def schedule(tmp_path):
    bundles, rows = tmp_path / f"k.1-01-{BUNDLES}.txt", tmp_path / f"k.1-02-{UTILIZATION}.txt"
    bundles.write_text(TEXT)
    rows.write_text(ROWS)
    return read_schedule(bundles, rows)


def parts(runs=2, trips=3):
    return (Part("loop", trips, (Part("guarded", runs),), loop=True, trips=(trips,)),)


def test_loops_and_guards_with_their_delay_slots(schedule):
    loop = schedule.tree.inside[0]
    assert (loop.kind, loop.start, loop.end, loop.trips) == ("loop", 1, 11, 3)
    assert [(r.kind, r.start, r.end) for r in loop.inside] == [("guard", 5, 7)]


def test_costs_are_own_bundles_times_runs(schedule):
    outside, loop, guarded = schedule.costs(parts())
    assert [(c.bundles, c.issued, c.runs) for c in (outside, loop, guarded)] == [(2, 2, 1), (8, 4, 3), (2, 2, 2)]
    assert guarded.load(schedule.capacity) == {"VALU": 0.75, "VLOAD": 0}


def test_other_regions_or_trips_than_expected_are_an_error(schedule):
    with pytest.raises(ValueError, match="guarded.*should hold"):
        schedule.costs((Part("loop", 3, (Part("guarded", 2, (Part("more", 1),)),), loop=True),))
    with pytest.raises(ValueError, match="should make 4 trips, the schedule says 3"):
        schedule.costs(parts(trips=4))


def test_an_optional_part_may_be_missing(schedule):
    branch = Part("branch", 9, optional=True)
    (*_, guarded) = schedule.costs((Part("loop", 3, (branch, Part("guarded", 2)), loop=True),))
    assert guarded.runs == 2
