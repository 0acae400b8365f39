"""Beginnings of stories, frozen: in the manner of TinyStories' evaluation prompts, in words of our own.

Each stops in the middle of a sentence, at a point that asks for something: a reason, a name, a feeling, the thing that
was told before. They never change; a test holds their sha256.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["PROMPTS", "Prompt"]


class Prompt(NamedTuple):
    """A beginning, and the names in it that a good story goes on to use."""

    text: str
    names: tuple[str, ...]


# names: beginning; a line that is indented goes on with the one before
TABLE = """
Lily: Once upon a time, there was a little girl named Lily. One morning she found a red kite behind the house. She
  wanted to fly it, but there was no
Tom Max: Tom had a small dog called Max. Every day they went to the park to play with a ball. Today the ball rolled
  into the pond, and Max
Anna: Anna was sad because her best friend had moved away. Her mom gave her some paper and said, "Why do you not write
Ben Mia: Ben and Mia built a tall tower of blocks. Ben put the last block on top. Then the cat jumped on the table,
  and the tower
Sara: It was a cold day and Sara could not find her warm hat. She looked under the bed and behind the door. At last
  she saw that the hat was
Sam: One night, Sam heard a strange noise outside his window. He was scared, but he took his light and went to see
  what it was. In the garden there was
Lucy Jack: Lucy had two cookies. Her brother Jack had none, and he began to cry. Lucy thought for a moment. Then she
Tim: There was a boy named Tim who did not like to share his toys. One day, the other children stopped playing with
  him, so Tim
Rosie: Rosie was a little rabbit who wanted to be brave. The other animals told her about a dark cave in the hill.
  Rosie said, "I am not afraid," and
Leo Nora: Leo and Nora went to the beach with their grandma. They found a big shell in the sand. When Leo held it to
  his ear,
Emma: Emma planted a seed in a blue pot. She gave it water every day and waited. After a week, nothing had come up.
  Emma asked her dad why, and he
Bob: Bob was an old truck that could not go fast any more. The new trucks laughed at him. But when the snow came and
  the road was closed, only Bob
Mia: Mia wanted to bake a cake for her mother's birthday. She took eggs, milk and flour. But by mistake she put in
  salt instead of sugar, so the cake
Finn: Finn was a small fish who lived in a big lake. He liked to hide between the stones. One day, he met a fish that
  was even smaller than he was, and it asked him,
Kate Zoe: Kate had a doll named Zoe. She took Zoe everywhere, even to school. On the way home, Kate opened her bag and
  saw that
Dan: Dan wanted a bike, but his family had no money for it. His neighbor had an old one that was broken. "If you help
  me in the garden," said the neighbor, "then
Ella: Ella did not want to go to bed. She was not tired at all. Her father said that he would read one story if
Pip: Pip the bird had a hurt wing and could not fly. Winter was near, and all the other birds had to leave. Only the
  old owl stayed and told him that
Amy Lucas: Amy and Lucas were in the forest, and they could not find the way home. It was getting dark. "Look," said
  Lucas, "we can follow the
Molly: Molly broke her mother's favorite cup. Nobody had seen it. She wanted to hide the pieces, but she felt bad
  inside. When her mother came home, Molly
Oscar: Oscar the bear was hungry after his long sleep. He went to the river to catch a fish, but the river was still
  full of ice. So he decided to
Jane Rex: Jane was afraid of the big dog next door. His name was Rex and he was very loud. One day, the gate was open
  and Rex
Max Lily: Max said that he was the fastest runner in the school. Lily said that she could win. All their friends came
  to watch the race. At first Max was ahead, but
Grace: Grace found a little key on the street. It was made of gold. She tried it on every door in the house, but it
  did not fit. Then her grandpa smiled and showed her
"""
PROMPTS = tuple(
    Prompt(" ".join(text.split()), tuple(names.split()))
    for names, text in re.findall(r"^(\w[\w ]*): (.+(?:\n  .+)*)$", TABLE, re.MULTILINE)
)
