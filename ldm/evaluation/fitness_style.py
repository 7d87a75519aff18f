"""The style sheet of the fitness page: light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #16191d; --soft: #5b6470; --line: #dfe3e8; --track: #e6e9ee;
  --good: #17804a; --usable: #a86400; --unfit: #c62f2f;
  --good-bg: #e3f4ea; --usable-bg: #fbeed8; --unfit-bg: #fbe3e3;
  --flat: #4c8dff; --edges: #16b8a6; --detail: #ff8a3d; --accent: #3563c9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #101316; --card: #181c21; --ink: #e8ebef; --soft: #98a2ae; --line: #2b3138; --track: #272d34;
    --good: #4fcf8d; --usable: #f2b24b; --unfit: #ff7d76;
    --good-bg: #12301f; --usable-bg: #35270f; --unfit-bg: #3a1919; --accent: #86a9ff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 4px 0 10px; text-wrap: balance; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 48px 0 4px; }
h3 { font-size: 16px; margin: 28px 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 46em; }
.soft, .lead { color: var(--soft); }
.lead { margin-bottom: 16px; }
.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 8px 0 0; padding: 12px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.eyebrow { font-size: 13px; color: var(--soft); margin: 0; }
.verdict { border-radius: 14px; padding: 24px 28px; border: 1px solid; }
.verdict .say { font-size: 18px; margin: 0; }
.verdict.good { background: var(--good-bg); border-color: var(--good); }
.verdict.usable { background: var(--usable-bg); border-color: var(--usable); }
.verdict.unfit { background: var(--unfit-bg); border-color: var(--unfit); }
.verdict.good h1, .text.good { color: var(--good); }
.verdict.usable h1, .text.usable { color: var(--usable); }
.verdict.unfit h1, .text.unfit { color: var(--unfit); }
.facts { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 16px 0 0; padding: 0; list-style: none;
  font-size: 14px; color: var(--soft); }
.facts li { overflow-wrap: anywhere; }
.facts b { color: var(--ink); font-weight: 600; }
.pill { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.pill.good { color: var(--good); background: var(--good-bg); }
.pill.usable { color: var(--usable); background: var(--usable-bg); }
.pill.unfit { color: var(--unfit); background: var(--unfit-bg); }

.reasons { display: grid; grid-template-columns: auto 1fr auto 170px; column-gap: 18px; }
.reasons > div { display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; align-items: center;
  grid-template-rows: auto auto; padding: 12px 0; border-top: 1px solid var(--line); }
.reasons > div:last-child { border-bottom: 1px solid var(--line); }
.reasons .pill { width: 64px; text-align: center; }
.reasons .pill, .sentence, .reasons .gauge { grid-row: 1 / 3; }
.sentence b { display: block; }
.reasons .figure { grid-area: 1 / 3; align-self: end; text-align: right; font-weight: 600; }
.reasons .limits { grid-area: 2 / 3; align-self: start; text-align: right; font-size: 13px; }
.gauge { position: relative; display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 2px; height: 8px; }
.gauge b { background: var(--unfit); opacity: .45; border-radius: 4px 0 0 4px; }
.gauge b + b { background: var(--usable); border-radius: 0; }
.gauge b + b + b { background: var(--good); border-radius: 0 4px 4px 0; }
.gauge i { position: absolute; top: -4px; width: 4px; height: 16px; margin-left: -2px; border-radius: 2px;
  background: var(--ink); box-shadow: 0 0 0 2px var(--paper); }

.steps { margin: 8px 0 0; padding-left: 22px; }
.steps li { margin-bottom: 14px; padding-left: 4px; }

.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: middle; }
th { font-weight: 600; color: var(--soft); font-size: 13px; line-height: 1.3; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { font-weight: 700; }
td .unit, td .was { color: var(--soft); font-weight: 400; }
th.name { overflow-wrap: anywhere; color: var(--ink); min-width: 7em; }
td.off { color: var(--usable); font-weight: 600; }

.ladder { display: grid; grid-template-columns: minmax(110px, 230px) 1fr 62px; column-gap: 16px; font-size: 14px;
  align-items: center; }
.ladder > div { display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; align-items: center;
  min-height: 30px; }
.ladder .label { overflow-wrap: anywhere; line-height: 1.25; padding: 3px 0; }
.ladder .label small { color: var(--soft); display: block; font-size: 12px; }
.ladder .track { position: relative; height: 10px; border-radius: 5px; background: var(--track); }
.ladder .range { position: absolute; top: 0; height: 10px; border-radius: 5px; background: var(--accent);
  opacity: .35; }
.ladder .half { position: absolute; top: 0; height: 10px; background: var(--accent); opacity: .55; }
.ladder .dot { position: absolute; top: -3px; width: 16px; height: 16px; margin-left: -8px; border-radius: 50%;
  border: 3px solid var(--paper); background: var(--soft); }
.ladder .ours .dot { background: var(--accent); }
.ladder .ours .label { font-weight: 600; }
.ladder .value { text-align: right; }
.ladder .group { display: block; color: var(--soft); font-size: 13px; padding: 14px 0 4px; }

.kinds { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; margin-top: 14px; }
.kind { background: var(--card); border: 1px solid var(--line); border-top: 4px solid; border-radius: 10px;
  padding: 14px 16px; }
.kind.flat { border-top-color: var(--flat); } .kind.edges { border-top-color: var(--edges); }
.kind.detail { border-top-color: var(--detail); }
.kind .name { font-weight: 600; margin: 0; } .kind .area { color: var(--soft); font-size: 13px; margin: 0 0 10px; }
.kind th, .kind td { padding: 5px 0 5px 12px; }
.kind th:first-child, .kind td:first-child { padding-left: 0; }
.kind tr:last-child td { border-bottom: 0; }
td.wraps { white-space: normal; overflow-wrap: anywhere; }

.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 0 0 12px; }
.legend span::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; background: var(--c); }
.shown { border-top: 1px solid var(--line); padding: 14px 0 18px; }
.shown .key { font-size: 13px; margin: 0 0 8px; color: var(--soft); overflow-wrap: anywhere; }
.shown .key b { color: var(--ink); }
.cells { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 256px)); gap: 10px 12px; }
.cells.many { grid-template-columns: repeat(var(--n), minmax(0, 200px)); }
figure { margin: 0; min-width: 0; }
figure img, .pair img { display: block; width: 100%; height: auto; background: var(--card); border-radius: 4px;
  outline: 1px solid var(--line); outline-offset: -1px; }
.crisp { image-rendering: pixelated; }
figcaption { font-size: 12px; color: var(--soft); margin-top: 4px; line-height: 1.35; overflow-wrap: anywhere; }
.typical { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 16px; }
.pair { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 3px; }
.typical.many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }

svg { display: block; max-width: 100%; }
.histogram rect { fill: var(--accent); opacity: .5; }
.histogram polyline { fill: none; stroke: var(--ink); stroke-width: 1.2; opacity: .75; }
td svg { margin: 0; }
.matrix .above { fill: var(--detail); } .matrix .below { fill: var(--flat); }
.matrix { background: var(--card); }
.two { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 32px; align-items: start; }
.two > * { min-width: 0; }
details { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
details dt { font-weight: 600; margin-top: 12px; } details dd { margin: 2px 0 0; max-width: 48em; color: var(--soft); }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); }

@media (max-width: 720px) {
  main { padding: 16px 16px 48px; }
  h1 { font-size: 27px; } h2 { margin-top: 36px; }
  .verdict { padding: 18px 18px; } .verdict .say { font-size: 16px; }
  .reasons { grid-template-columns: auto minmax(0, 1fr) auto; column-gap: 12px; }
  .reasons > div { grid-template-rows: none; }
  .reasons .pill, .sentence b, .reasons .figure { grid-row: 1; align-self: center; }
  .sentence { display: contents; }
  .why { grid-area: 2 / 1 / 3 / -1; margin-top: 4px; }
  .reasons .limits { grid-area: 3 / 1 / 4 / -1; text-align: left; }
  .reasons .gauge { grid-area: 4 / 1 / 5 / -1; margin: 8px 0 4px; }
  .typical { grid-template-columns: repeat(auto-fill, minmax(min(100%, 160px), 1fr)); }
  .kinds { grid-template-columns: 1fr; gap: 10px; }
  .cells { gap: 8px; } .cells.one { --n: 2 !important; }
  .two { grid-template-columns: minmax(0, 1fr); gap: 16px; }
  .ladder { grid-template-columns: minmax(92px, 34%) 1fr auto; column-gap: 10px; }
}
"""
