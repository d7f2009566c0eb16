"""YAML as text: the values of a recipe as they are written, since the type of a key says what they mean.

Within a mapping, where no key has a type, YAML's own types hold, but for those of YAML 1.1 that surprise:
dates, numbers of base 60 and octal ones stay text, and 1e-5 is a number.
"""

import re
from typing import Any

import yaml


def mapping_of_texts(text: str) -> dict[str, Any] | None:
    """The values of a document by their names: texts, lists of texts, mappings, or None for `null`.

    None if the document is no mapping of names. Raises `yaml.YAMLError` where it is malformed.
    """
    loader = Loader(text)
    try:
        return loader.mapping_of_texts()
    finally:
        loader.dispose()


class Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice."""

    def mapping_of_texts(self) -> dict[str, Any] | None:
        """The document's values as texts; None if it is no mapping of names."""
        node = self.get_single_node()
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
            self.construct_document(node)  # what is malformed is reported first
            return None
        self._refuse_twice(node)
        self.flatten_mapping(node)
        keys = [self.construct_object(key) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            return None
        return {key: self._text(value) for key, (_, value) in zip(keys, node.value, strict=True)}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self._refuse_twice(node)
        return super().construct_mapping(node, deep)

    def _text(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._text(item) for item in node.value]
        value = self.construct_object(node, deep=True)
        return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))


_TAG = "tag:yaml.org,2002:"
_NUMBERS = (
    (f"{_TAG}int", re.compile(r"[-+]?\d+$"), list("-+0123456789")),
    (
        f"{_TAG}float",
        re.compile(r"(?:[-+]?(?:\.\d+|\d+\.\d*|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.nan)$"),
        list("-+.0123456789"),
    ),
)
Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _number in _NUMBERS:
    Loader.add_implicit_resolver(*_number)
Loader.add_constructor(f"{_TAG}int", lambda _, node: int(str(node.value)))
