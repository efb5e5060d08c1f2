"""Does every level still draw what bf16 draws?"""


def test_image(level, suite):
    """The timed image is as close to the same run's bf16 image and to the stored one as the baseline's were."""
    suite.require_image_workload()
    suite.require(suite.session.fidelity(level))


def test_step_error(level, suite):
    """The first step's output differs from float32 no more than the level's number formats explain."""
    suite.require(suite.session.step_error(level))
