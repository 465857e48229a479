"""What is wrong with a study."""


class StudyError(ValueError):
    """A study that cannot be run as asked; the message names the setting, its value and what was expected."""
