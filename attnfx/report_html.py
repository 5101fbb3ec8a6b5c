"""A report as one HTML page that needs no other file."""

from html import escape
from string import Template
from typing import TYPE_CHECKING

from attnfx.report_text import Group, buffers_of, groups, summary

if TYPE_CHECKING:
    from attnfx.report import Missed, Report

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>attnfx report</title>
<style>
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --line: #dfe3ea; --page: #f6f7f9; --card: #fff;
  --exact: #1a7f4b; --approximate: #b4540a; --missed: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf1; --soft: #9aa4b5; --line: #303847; --page: #14181f;
  --card: #1c222c; --exact: #57c48a; --approximate: #f0a35e; --missed: #9ca3af; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2.5rem 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .75rem; }
p.summary { margin: 0 0 1.5rem; color: var(--soft); }
section.site { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--tone);
  border-radius: .5rem; padding: .9rem 1.1rem; margin: 0 0 .8rem; }
section.site header { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .875rem; }
.module { font-weight: 600; overflow-wrap: anywhere; }
.tag { color: var(--tone); font-size: .85rem; font-weight: 600; }
.decision { margin-left: auto; color: var(--soft); font-size: .9rem; }
.formula { display: block; margin: .45rem 0; overflow-wrap: anywhere; }
.reason { margin: 0; color: var(--soft); font-size: .93rem; }
.exact { --tone: var(--exact); } .approximate { --tone: var(--approximate); } .missed { --tone: var(--missed); }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
pre { overflow: auto; max-height: 32rem; padding: .8rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--page); }
</style>
</head>
<body>
<main>
<h1>attnfx report</h1>
<p class="summary">$summary</p>
$body
</main>
</body>
</html>
""")

_SITE = Template("""\
<section class="site $tone">
<header><code class="module">$module</code><span class="tag">$tag</span><span class="decision">$decision</span></header>
$formula<p class="reason">$reason</p>
$details</section>
""")


def page(report: "Report") -> str:
    """The page: a card for each group of equal attentions, the near misses, the policy's warnings, the two graphs."""
    parts = [_site(group) for group in groups(report)]
    if report.missed:
        parts += ["<h2>Left as they were</h2>", *map(_missed, report.missed)]
    if report.breaks:
        lines = (f"<li>{escape(b.reason)}<br><code>{escape(b.source)}</code></li>" for b in report.breaks)
        parts += ["<h2>In no graph</h2>", f"<ul>{''.join(lines)}</ul>"]
    if report.policy_warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in report.policy_warnings)
        parts.append(f"<h2>Policy</h2><ul>{items}</ul>")
    if report.before or report.after:
        parts += ["<h2>Graphs</h2>", _folded("Before", report.before), _folded("After", report.after)]
    return _PAGE.substitute(summary=escape(summary(report)), body="\n".join(parts))


def _site(group: Group) -> str:
    site = group.sites[0]
    members = "\n".join(f"{member.module}  {member.source}".rstrip() for member in group.sites)
    return _SITE.substitute(
        tone="exact" if site.exact else "approximate",
        module=escape(group.modules),
        tag=escape(site.exactness),
        decision=escape(site.decision),
        formula=f'<code class="formula">{escape(str(site.site))}</code>\n',
        reason=escape(" ".join(filter(None, (site.reason, *site.biases, buffers_of(group))))),
        details=_folded("Where in the model", members) + _folded("Generated kernel", site.kernel or ""),
    )


def _missed(missed: "Missed") -> str:
    return _SITE.substitute(
        tone="missed",
        module=escape(missed.module or missed.node),
        tag="not rewritten",
        decision=escape(missed.source),
        formula="",
        reason=escape(missed.reason),
        details="",
    )


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>\n" if text else ""
