"""Stand-in."""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any
from collections.abc import Mapping
@dataclass(frozen=True)
class View:
    """v"""
    number: int; leader: str; hosts: tuple; orders: Mapping[str, Any]; why: tuple
@dataclass(frozen=True)
class Halted:
    number: int
@dataclass(frozen=True)
class Entered:
    view: View
@dataclass(frozen=True)
class Fenced:
    sentence: str
@dataclass(frozen=True)
class Left:
    pass
Change = Halted|Entered|Fenced|Left
class Member:
    def __init__(self, me, rules=None, *, assign, report, witness=None, last=0):
        self.me=me; self.assign=assign; self.report=report; self.n=last; self.view=None; self.ch=[]
    def found(self, now): self._next(())
    def _next(self, why):
        if self.view: self.ch.append(Halted(self.view.number))
        self.n+=1
        self.view=View(self.n,self.me,(self.me,),self.assign({self.me:self.report()}),tuple(why))
        self.ch.append(Entered(self.view))
    def call(self, why, now): self._next([why])
    def tick(self, now): pass
    def take_outbox(self): return []
    def take_changes(self):
        c,self.ch=self.ch,[]; return c
