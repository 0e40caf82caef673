"""The style sheet of an adapter's page: light, and dark where the reader's system is."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ground: #fff; --panel: #f6f8fa; --ink: #1f2933; --faint: #5b6875; --line: #d5dce3;
  --good: #1a7f4b; --bad: #b42318; --accent: #0b5cad; --mark: #8a5a00;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b0508a; --s4: #8c6d00; --s5: #4a3aa7; --s6: #56707f; --s7: #a11d33; }
@media (prefers-color-scheme: dark) { :root { --ground: #12171d; --panel: #1b222a; --ink: #e4e9ee; --faint: #9aa7b4;
  --line: #364250; --good: #58c98c; --bad: #ff8a7d; --accent: #6cb2ff; --mark: #e5b567;
  --s0: #56b4e9; --s1: #ff9153; --s2: #3fd0a2; --s3: #ec9cc9; --s4: #e0c24b; --s5: #b0a5ff; --s6: #a9c1ce; --s7: #ff8095; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1000px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 6px; }
p { margin: 0 0 10px; max-width: 76ch; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; padding: 12px 16px;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.scrolled { overflow-x: auto; }
.chart { display: block; width: 100%; min-width: 560px; height: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick, .axis { fill: var(--faint); font-size: 12px; } .end { text-anchor: end; } .mid { text-anchor: middle; }
.mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 5 4; }
.limit { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 2 3; }
.ground { stroke: var(--faint); stroke-width: 1; }
.joined { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.dot { fill: currentColor; } .hollow { fill: var(--panel); stroke: currentColor; stroke-width: 1.5; }
.fall { stroke: currentColor; stroke-width: 1.5; } .cross { stroke: currentColor; stroke-width: 2; fill: none; }
.plain { color: var(--accent); }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .s6 { color: var(--s6); } .s7 { color: var(--s7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 8px; padding: 0; }
.legend li { overflow-wrap: anywhere; } .swatch { display: inline-block; width: 10px; height: 10px; margin-right: 6px;
  border-radius: 5px; background: currentColor; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; }
.heat th, .heat td { padding: 5px 8px; border: 1px solid var(--ground); font-size: 13px; }
.heat td { text-align: center; min-width: 46px; } .heat thead th { text-align: center; color: var(--faint); white-space: nowrap; }
.heat tbody th { min-width: 130px; max-width: 260px; overflow-wrap: anywhere; font-weight: 500; } .heat .none { color: var(--line); }
.key { color: var(--faint); font-size: 13px; margin-top: 4px; }
.fates { width: 100%; } .fates th { font-weight: 500; padding: 3px 12px 3px 0; overflow-wrap: anywhere; }
.fates td { padding: 3px 8px; } .bars { width: 45%; } .bar { display: block; height: 12px; min-width: 2px; border-radius: 3px;
  background: var(--accent); }
.list { width: 100%; font-size: 13px; } .list th, .list td { padding: 4px 8px; border-bottom: 1px solid var(--line);
  vertical-align: top; } .list thead th { color: var(--faint); white-space: nowrap; }
.number { text-align: right; white-space: nowrap; } .reason { overflow-wrap: anywhere; min-width: 110px; max-width: 240px; }
.outcome.promoted { color: var(--good); } .outcome.refused { color: var(--bad); font-weight: 600; }
.tag { display: inline-block; margin-left: 6px; padding: 0 6px; border: 1px solid var(--line); border-radius: 8px; font-size: 11px;
  color: var(--faint); white-space: nowrap; } .tag.live { color: var(--good); border-color: var(--good); } .tag.drift { color: var(--mark); border-color: var(--mark); }
.empty { padding: 14px 16px; background: var(--panel); border: 1px dashed var(--line); border-radius: 6px; color: var(--faint); }
p code { overflow-wrap: anywhere; } td code { white-space: nowrap; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; }
footer { margin-top: 32px; color: var(--faint); font-size: 13px; }
@media print { body { max-width: none; } .scrolled { overflow: visible; } }
"""
