"""Style and script of the report's page: calm, light and dark, and nothing fetched.

PAPER: two strings. Not here: what they dress (`report_page.py`, `charts.py`). Traded away:
readability of a formatted style sheet; the rules are one to a line or so, because every page
carries them.
"""

STYLE = """
:root{color-scheme:light dark;--bg:#fafaf8;--card:#fff;--ink:#1f2428;--soft:#6a727b;--rule:#e4e4df;
--c0:#2a66b0;--c1:#c8602a;--c2:#3b8a63;--c3:#8657ad;--c4:#a8822b;--c5:#c94a78;
--good:#2e7d54;--note:#a8822b;--bad:#b5392f;--lift:0 1px 2px #0000000a}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1a1e22;--ink:#e4e7ea;--soft:#929ba5;
--rule:#2c3238;--c0:#6ba6ec;--c1:#e88d57;--c2:#63b88e;--c3:#b18ad6;--c4:#d1ac57;--c5:#e57ba1;
--good:#63b88e;--note:#d1ac57;--bad:#e8776c;--lift:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;
-webkit-font-smoothing:antialiased}
main{max-width:1160px;margin:0 auto;padding:40px 28px 64px}
h1{font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0;
overflow-wrap:anywhere}
h2{font-size:17px;font-weight:620;margin:44px 0 14px;letter-spacing:-.005em}
h3{font-size:14px;font-weight:600;margin:0}
small{font-size:12.5px;font-weight:400;color:var(--soft);margin-left:5px}
header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:baseline}
.state{font-size:13px;font-weight:600;color:var(--k);border:1px solid currentColor;
border-radius:99px;padding:1px 11px;align-self:center}
.about{color:var(--soft);margin:6px 0 0}
.verdict{list-style:none;padding:0;margin:22px 0 0;display:grid;gap:5px}
.verdict li{padding-left:20px;position:relative}
.verdict li::before{content:"";position:absolute;left:1px;top:.5em;width:9px;height:9px;
border-radius:50%;background:var(--k)}
.verdict .bad{font-weight:600}
.good{--k:var(--good)}.note{--k:var(--note)}.bad{--k:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;
background:var(--rule);border:1px solid var(--rule);border-radius:10px;overflow:hidden;
margin:26px 0 0}
.tiles div{background:var(--card);padding:13px 16px}
.tiles dt{color:var(--soft);font-size:12.5px;margin:0}
.tiles dd{margin:1px 0 0;font-size:21px;font-weight:600;letter-spacing:-.01em;white-space:nowrap}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:14px 18px 37px;box-shadow:var(--lift);min-width:0;display:flex;flex-direction:column}
figure.tall{grid-column:1/-1}
figcaption{display:flex;justify-content:space-between;align-items:baseline;gap:10px;min-height:22px}
.toggle{font:inherit;font-size:12px;color:var(--soft);background:none;border:1px solid var(--rule);
border-radius:6px;padding:0 8px;cursor:pointer}
.toggle:hover,.toggle:focus-visible{color:var(--ink);border-color:var(--soft)}
.toggle::after{content:"linear"}[data-scale=log] .toggle::after{content:"log"}
.legend{margin:3px 0 13px;font-size:12.5px;color:var(--soft);display:flex;flex-wrap:wrap;
gap:0 16px}
.key b{color:var(--ink);font-weight:600;display:inline-block;min-width:2.6em}
.key i{display:inline-block;width:14px;height:0;border-top:2px solid var(--c);margin-right:5px;
vertical-align:.26em}
.key i.level{--c:var(--ink);border-top:1px dashed}
.key i.faint{opacity:.45}
.key i.area{border-top-width:9px;vertical-align:-.03em;opacity:.8;width:9px}
.key i.dots{width:7px;height:7px;border:0;border-radius:50%;background:var(--c);
vertical-align:.06em}
.plot{display:block;overflow:visible;width:calc(100% - 52px);height:176px;margin-left:52px;
margin-top:auto;touch-action:pan-y}
.tall .plot{height:270px}
.axis text{font-size:11.5px;fill:var(--soft)}
.axis line{stroke:var(--rule);shape-rendering:crispEdges}
path{fill:none;stroke:var(--c);vector-effect:non-scaling-stroke;stroke-width:1.7;
stroke-linejoin:round;stroke-linecap:round}
path.faint{stroke-width:1;opacity:.32}
.plot circle{r:3.5px;fill:var(--c)}
path.area{fill:var(--c);fill-opacity:.72;stroke:none}
line.level{stroke:var(--ink);stroke-dasharray:4 4;opacity:.8}
text.level{font-size:11.5px;fill:var(--soft);text-anchor:end;paint-order:stroke;stroke:var(--card);
stroke-width:4px;stroke-linejoin:round}
line.mark{stroke:var(--bad);opacity:.5}
.cursor line{stroke:var(--soft);opacity:.7;shape-rendering:crispEdges}
.cursor circle{r:4px;stroke:var(--card);stroke-width:1.5}
.catch{fill:none;pointer-events:all}
[data-scale=log] .linear,[data-scale=linear] .log{display:none}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:7px 16px;vertical-align:baseline;border-top:1px solid var(--rule)}
tr:first-child>*{border-top:0}
th{font-weight:500;color:var(--soft);font-size:12.5px;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap}
td.d{color:var(--soft);overflow-wrap:anywhere}td.d b{font-weight:500;color:var(--ink)}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:13px}
pre{margin:0;padding:16px 18px;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.55}
footer{margin-top:48px;color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
@media(max-width:760px){main{padding:24px 16px 48px}.grid{grid-template-columns:minmax(0,1fr)}
figure{padding:12px 14px 35px}.tall .plot{height:220px}h1{font-size:25px}}
@media print{figure,.tiles,.scroll{break-inside:avoid}.toggle{display:none}}
"""

SCRIPT = """
const figures=[...document.querySelectorAll('figure')].map(f=>({f,plot:f.querySelector('.plot'),
d:JSON.parse(f.querySelector('script').textContent),cursor:f.querySelector('.cursor'),
keys:[...f.querySelectorAll('.key b')]}));
for(const g of figures){g.last=g.keys.map(k=>k.textContent);
const t=g.f.querySelector('.toggle');
if(t)t.onclick=()=>{g.f.dataset.scale=g.f.dataset.scale=='log'?'linear':'log';hide()};
g.plot.onpointermove=e=>{const r=g.plot.getBoundingClientRect(),[a,b]=g.d.x;
const x=a+(b-a)*Math.min(1,Math.max(0,(e.clientX-r.left)/r.width));
for(const o of figures)show(o,x,o==g)};
g.plot.onpointerleave=hide}
function hide(){for(const g of figures){g.cursor.innerHTML='';
g.keys.forEach((k,i)=>k.textContent=g.last[i])}}
function nearest(xs,x){let a=0,b=xs.length-1;while(b-a>1){const m=a+b>>1;xs[m]<x?a=m:b=m}
return Math.abs(xs[a]-x)<Math.abs(xs[b]-x)?a:b}
function show(g,x,labelled){const[a,b]=g.d.x,s=g.f.dataset.scale,[lo,hi]=g.d.y[s];
const at=100*(x-a)/(b-a);if(at<0||at>100){g.cursor.innerHTML='';return}
let out=`<line x1="${at}%" x2="${at}%" y2="100%"/>`;
g.d.lines.forEach((l,i)=>{if(!l.x.length)return;const j=nearest(l.x,x),v=l.y[j],p=(l.top||l.y)[j];
g.keys[i].textContent=v==null?'-':write(v);if(v==null||s=='log'&&p<=0)return;
const y=s=='log'?Math.log(p/lo)/Math.log(hi/lo):(p-lo)/(hi-lo);
if(y>=0&&y<=1)out+=`<circle cx="${100*(l.x[j]-a)/(b-a)}%" cy="${100-100*y}%"
 style="--c:${l.colour}"/>`});
if(labelled)out+=`<text class="level" x="${at}%" dx="${at>88?-6:6}" y="8"
 style="text-anchor:${at>88?'end':'start'}">${Math.round(x).toLocaleString('en')}</text>`;
g.cursor.innerHTML=out}
function write(v){const m=Math.abs(v);if(m&&(m<1e-3||m>=1e7))return v.toExponential(2);
return m>=1e3?Math.round(v).toLocaleString('en'):String(+v.toPrecision(4))}
"""
