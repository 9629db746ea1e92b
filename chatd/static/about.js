// The URL in the instructions as this browser sees it: the scheme and the path may be those of a proxy.
// This script is for every browser, so it is ECMAScript 5.
(function () {
  "use strict";
  var path = location.pathname.replace(/about$/, "");
  var url = (location.protocol === "https:" ? "wss://" : "ws://") + location.host + path;
  var places = document.querySelectorAll(".url");
  for (var i = 0; i < places.length; i += 1) places[i].textContent = url;
})();
