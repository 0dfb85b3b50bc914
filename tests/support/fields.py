"""Many fields of a configuration in one line."""


def set_all(config, **values):
    """Sets nested fields: `training__steps=4` is `config.training.steps = 4`."""
    for key, value in values.items():
        *path, name = key.split("__")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, name, value)
