from fastsm.core.judging import Judge

class Chunk:
    @property
    def judgement(self) -> Judge: ...
