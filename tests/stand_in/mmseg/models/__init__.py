"""The registry, as far as it is used: a class registers itself under its name."""


class Registry:
    def __init__(self):
        self.classes = {}

    def register_module(self):
        def register(cls):
            self.classes[cls.__name__] = cls
            return cls

        return register

    def get(self, name):
        return self.classes.get(name)


UDA = Registry()
