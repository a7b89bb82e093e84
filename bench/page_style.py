"""The report's style and script: system fonts, two palettes, one column on a phone. Series colours differ in lightness too."""
from . import plots

STYLE = """:root{color-scheme:light dark;--bg:#f6f5f1;--card:#fff;--ink:#1f2428;--soft:#5b646c;--line:#e0ddd5;--bad:#a8323a;--good:#1d6b45;--tint:#e8f1f1;
--s0:#13747d;--s1:#c2613d;--s2:#8494a3;--s3:#c79a3a;--s4:#5a9158;--s5:#7d5ba6;--s6:#3c6db8;--s7:#a34a70;--s8:#7a5c3e;--s9:#98a232;--s10:#56a9cf;--s11:#d1709f}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2125;--ink:#e6e8ea;--soft:#9ba5ae;--line:#323940;--bad:#ff8f8f;--good:#7fd3a4;--tint:#1d3335;
--s0:#45b8c2;--s1:#e5906c;--s2:#9fb0c0;--s3:#e3c070;--s4:#8cc48a;--s5:#ba9cdc;--s6:#7fabf2;--s7:#dd8fae;--s8:#bd9a75;--s9:#c9d162;--s10:#a5d8ef;--s11:#f3a9cb}}
*{box-sizing:border-box}html{scroll-padding-top:7rem}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,sans-serif}
main{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.9rem;line-height:1.2;margin:0}h2{font-size:1.35rem;margin:2.5rem 0 .7rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}p{margin:.4rem 0}.soft{color:var(--soft)}.bad{color:var(--bad)}.good{color:var(--good)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.8rem}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,12rem),1fr));gap:.8rem;margin:1.2rem 0}
.card,.case{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem;min-width:0}.card{overflow-wrap:anywhere}
.stat b{display:block;font-size:2rem;line-height:1.2;font-weight:650;letter-spacing:-.01em}.stat.lead{background:var(--tint);border-color:transparent}
.stat span{font-size:.87rem}.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:600;vertical-align:bottom}td:first-child,th:first-child,.left{text-align:left}td.left{white-space:normal;min-width:13rem}table{overflow-wrap:normal}
tr.ours td:first-child{font-weight:650}a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:2px}svg{width:100%;height:auto;display:block}
.case{margin:.5rem 0;padding:0}.case>summary{display:flex;flex-wrap:wrap;gap:.1rem 1rem;align-items:baseline;padding:.6rem 1rem;cursor:pointer;list-style:none}
.case>summary::-webkit-details-marker{display:none}.case>summary::before{content:"▸";color:var(--soft)}.case[open]>summary::before{content:"▾"}
.case>summary h4{font-size:.95rem;font-weight:600;margin:0;flex:1 1 14rem;overflow-wrap:anywhere}.case>summary span{font-variant-numeric:tabular-nums;font-size:.9rem}
.body{display:grid;gap:.8rem;padding:.2rem 1rem 1rem;grid-template-columns:minmax(0,1fr)}.body svg{max-width:32rem}.body p{font-size:.87rem}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}details.more>summary{cursor:pointer;color:var(--soft)}
nav{position:sticky;top:0;background:var(--bg);padding:.7rem 0;display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;border-bottom:1px solid var(--line);z-index:1;margin-top:2rem}
input,select,button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.3rem .6rem}button{cursor:pointer}
input{flex:1 1 12rem;min-width:0}.key{display:flex;flex-wrap:wrap;gap:.1rem .9rem;flex-basis:100%;font-size:.87rem}
.key i{display:inline-block;width:.75em;height:.75em;border-radius:3px;margin-right:.35em}@media(max-width:40rem){html{scroll-padding-top:1rem}nav{position:static}
.cards{grid-template-columns:1fr 1fr}.stat b{font-size:1.5rem}.stat span{font-size:.8rem}td.left{min-width:11rem}}
text{fill:currentColor;font:12px system-ui,-apple-system,sans-serif}.t{font-weight:650;font-size:13px}.m{text-anchor:middle}.e{text-anchor:end}.a{fill:var(--soft);font-size:11px}
.g{stroke:var(--line);fill:none}.d{fill:none;stroke:var(--soft);stroke-dasharray:5 4}.l{fill:none;stroke-width:2}.w{fill:none;stroke:var(--ink)}
.r{stroke:var(--s0);stroke-width:3;stroke-linecap:round;opacity:.35}
""" + "".join(f".p.s{k}{{fill:var(--s{k})}}.l.s{k}{{stroke:var(--s{k})}}.key i.s{k}{{background:var(--s{k})}}" for k in range(plots.SERIES))

SCRIPT = """const box=document.getElementById('words'),op=document.getElementById('op'),count=document.getElementById('count'),fold=document.getElementById('fold');
const cases=[...document.querySelectorAll('.case')],groups=[...document.querySelectorAll('section[data-op]')];
function filter(){const words=box.value.toLowerCase().split(/\\s+/).filter(Boolean);let shown=0;
for(const c of cases){const fits=(!op.value||c.dataset.op===op.value)&&words.every(w=>c.dataset.words.includes(w));c.hidden=!fits;shown+=fits}
for(const g of groups)g.hidden=![...g.querySelectorAll('.case')].some(c=>!c.hidden);
count.textContent=shown+' of '+cases.length+' cases'}
function label(){fold.textContent=cases.some(c=>!c.open)?'open all':'close all'}
box.addEventListener('input',filter);op.addEventListener('change',filter);filter();label();
fold.addEventListener('click',()=>{const open=cases.some(c=>!c.open);for(const c of cases)c.open=open});
for(const c of cases)c.addEventListener('toggle',label);
document.addEventListener('click',e=>{if(e.target.dataset.copy!==undefined)navigator.clipboard.writeText(e.target.previousElementSibling.textContent)
.then(()=>{e.target.textContent='copied'},()=>{e.target.textContent='select and copy'})});"""
