// The whole page: who is signed in, which view the address names, and whether the server answers.

import { connection, get, setToken, token } from "./api.js";
import { html, render, useEffect, useState } from "./html.js";
import { Login } from "./login.js";
import { repeatedly, useConnection } from "./look.js";
import { ModelView } from "./model.js";
import { Overview } from "./overview.js";
import { Button, ProblemNote } from "./parts.js";
import { seconds } from "./words.js";

function placeOf(hash) {
  const [, kind, name, tab] = hash.split("/");
  if (kind !== "models" || !name) return { name: null, tab: "" };
  try {
    return { name: decodeURIComponent(name), tab: tab || "training" };
  } catch {
    return { name: null, tab: "" };
  }
}

function usePlace() {
  const [place, setPlace] = useState(placeOf(location.hash));
  useEffect(() => {
    const follow = () => setPlace(placeOf(location.hash));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return place;
}

// Who this token belongs to, and which server this is.
function useServer(held, turn) {
  const [server, setServer] = useState(null);
  useEffect(() => {
    setServer(null);
    return repeatedly(async (signal) => {
      try {
        setServer({ ...(await get("", {}, signal)).found, problem: null });
      } catch (problem) {
        if (problem.name !== "AbortError" && !problem.isLost) setServer({ problem });
        throw problem;
      }
    }, 60_000);
  }, [held, turn]);
  return server;
}

function ThemeSwitch() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
  const [theme, setTheme] = useState(now);
  useEffect(() => {
    const follow = () => setTheme(now());
    system.addEventListener("change", follow);
    return () => system.removeEventListener("change", follow);
  }, []);
  const other = theme === "dark" ? "light" : "dark";
  function change() {
    document.documentElement.dataset.theme = other;
    localStorage.setItem("pushstep-theme", other);
    setTheme(other);
    dispatchEvent(new Event("themechange"));
  }
  return html`<${Button} kind="plain" onClick=${change}>${other === "dark" ? "Dark" : "Light"}<span class="hidden"> theme</span></${Button}>`;
}

function Bar({ server, onSignOut }) {
  const caller = server?.caller;
  return html`<header class="bar"><div class="inner">
    <a class="brand" href="#/"><img src="ui/icon.svg" alt="" width="24" height="24" />pushstep</a>
    <span class="where">${location.host}${server?.version && html`<span class="quiet"> · ${server.version}</span>`}</span>
    ${caller && html`<span class="who"><b>${caller.name}</b> <span class="role">${caller.role}</span></span>`}
    <${ThemeSwitch} />
    ${token() && html`<${Button} kind="plain" onClick=${onSignOut}>Sign out</${Button}>`}
  </div></header>`;
}

function Lost() {
  const [, setTurn] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => setTurn((turn) => turn + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  return html`<div class="lost" role="alert">
    <div class="inner"><strong>The server does not answer</strong>
    <span aria-hidden="true"> since ${seconds(Math.round((Date.now() - connection.sinceMs) / 1000))}</span>.
    What you see is from before. This page tries again by itself, and workers do, too.</div>
  </div>`;
}

function Page() {
  const [turn, setTurn] = useState(0);
  const held = token();
  const follows = useConnection();
  const server = useServer(held, turn);
  const place = usePlace();
  useEffect(() => {
    document.title = place.name ? `${place.name} · pushstep` : "pushstep";
  }, [place.name]);

  function signIn(text) {
    setToken(text);
    setTurn((before) => before + 1);
  }

  let view;
  if (follows.isRefused) view = html`<${Login} problem=${held ? follows.isRefused : null} onToken=${signIn} />`;
  else if (server?.problem) view = html`<${ProblemNote} problem=${server.problem} />`;
  else if (!server) view = html`<p class="quiet" role="status">Loading…</p>`;
  else if (server.caller?.role === "worker") {
    view = html`<${Login} onToken=${signIn} problem=${{ code: "permission_denied", message: `The token ${server.caller.name} is a worker's. This page is for viewers and operators.` }} />`;
  } else {
    const mayEdit = !server.caller || server.caller.role === "operator";
    view = place.name
      ? html`<${ModelView} key=${place.name} name=${place.name} tab=${place.tab} mayEdit=${mayEdit} />`
      : html`<${Overview} mayEdit=${mayEdit} grpc=${server.grpc} ranks=${server.ranks} />`;
  }
  return html`<a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("main").focus();
    }}>To the content</a>
    <${Bar} server=${server} onSignOut=${() => signIn(null)} />
    ${follows.isLost && html`<${Lost} />`}
    <main id="main" tabindex="-1" class=${follows.isLost ? "inner stale" : "inner"}>${view}</main>`;
}

render(html`<${Page} />`, document.getElementById("app"));
