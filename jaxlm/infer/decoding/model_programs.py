"""The compiled programs of a model: of prompts, of decoding and of slots."""

from functools import lru_cache, partial

from jaxlm.infer.decoding import decode_programs, prompt_programs, slot_programs
from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.infer.decoding.timed_program import TimedProgram


class Programs:
    """The programs of a model, each compiled for every shape it is called with."""

    def __init__(self, spec: DecodingSpec):
        """Compiles nothing yet. What each takes and returns is told where it is."""
        self.spec = spec
        prompts, decoding = prompt_programs, decode_programs
        self.begin = TimedProgram(partial(prompts.begin, spec), static=("room",))
        self.extend = TimedProgram(partial(prompts.extend, spec), donate=(4, 5))
        self.grow = TimedProgram(partial(prompts.grow, spec))
        self.take_rows = TimedProgram(prompts.take_rows)
        self.split = TimedProgram(partial(decoding.split, spec))
        self.advance = TimedProgram(partial(decoding.advance, spec), donate=(1,))
        self.decode = TimedProgram(
            partial(decoding.decode, spec), donate=(1,), static=("steps",)
        )
        self.place = TimedProgram(slot_programs.place)
        self.insert = TimedProgram(slot_programs.insert, donate=(0,))

    @property
    def compile_s(self) -> float:
        """Seconds spent on compiling so far."""
        programs = (x for x in vars(self).values() if isinstance(x, TimedProgram))
        return sum(program.compile_s for program in programs)


@lru_cache(maxsize=32)
def programs_of(spec: DecodingSpec) -> Programs:
    """Returns the programs for a spec; those of the specs used last are kept."""
    return Programs(spec)
